// Products of a few rows: a warp per output and tile of rows, so that a weight is read from memory
// once for the tile. The order of a dot product's additions depends on its length and on the
// alignment alone, never on the number of rows.
#pragma once

#include "common/linear.h"
#include "common/vector.cuh"

namespace kelix::cuda {

inline constexpr int kSkinnyWarps = 8;
inline constexpr int kSkinnyThreads = kSkinnyWarps * kWarpSize;

template <class T, int kRows, int kWidth>
__global__ void __launch_bounds__(kSkinnyThreads) skinny_linear_kernel(SkinnyLinearArgs args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kSkinnyWarps + threadIdx.x / kWarpSize;
  if (output >= args.out) return;  // whole warps
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRows;
  const T* weight = static_cast<const T*>(args.weight) + output * args.in;
  const T* rows[kRows];  // a short tile repeats the last row, and does not store it
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < args.rows ? first + r : args.rows - 1;
    rows[r] = static_cast<const T*>(args.x) + row * args.in;
  }
  float sums[kRows] = {};
#pragma unroll 4
  for (int64_t at = lane * kWidth; at < args.in; at += kWarpSize * kWidth) {
    float w[kWidth];
    load_floats(weight + at, w);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float v[kWidth];
      load_floats(rows[r] + at, v);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[r] += w[i] * v[i];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float sum = warp_sum(sums[r]);
    if (lane == 0 && first + r < args.rows) {
      static_cast<T*>(args.y)[(first + r) * args.out + output] = from_float<T>(sum);
    }
  }
}

}  // namespace kelix::cuda
