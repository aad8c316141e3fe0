// Products of a few rows: a warp per output, or two of int8, and tile of rows, so that a weight is
// read from memory once for the tile. The order of a dot product's additions depends on its length
// and on the alignment alone, never on the number of rows.
#pragma once

#include "common/linear.h"
#include "common/vector.cuh"

namespace kelix::cuda {

inline constexpr int kSkinnyWarps = 8;
inline constexpr int kSkinnyThreads = kSkinnyWarps * kWarpSize;

// The rows of a tile; a short one repeats the last row, and does not store it.
template <class T, int kRows>
__device__ __forceinline__ void tile_rows(const SkinnyLinearArgs& args, int64_t first,
                                          const T* (&rows)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r < args.rows ? first + r : args.rows - 1;
    rows[r] = static_cast<const T*>(args.x) + row * args.in;
  }
}

template <class T, int kRows, int kWidth>
__global__ void __launch_bounds__(kSkinnyThreads) skinny_linear_kernel(SkinnyLinearArgs args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kSkinnyWarps + threadIdx.x / kWarpSize;
  if (output >= args.out) return;  // whole warps
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRows;
  const T* weight = static_cast<const T*>(args.weight) + output * args.in;
  const T* rows[kRows];
  tile_rows(args, first, rows);
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

// A lane reads kInt8Width weights of each output at a time, and rows of x in quarters of that, for
// both outputs. Row tiles are the grid's first dimension: CTAs that read the same weights run side
// by side, and the second finds them in the L2 cache.
inline constexpr int kInt8Outputs = 2;

template <class T, int kRows, int kWidth>
__global__ void __launch_bounds__(kSkinnyThreads) skinny_linear_int8_kernel(SkinnyLinearArgs args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.y) * kSkinnyWarps + threadIdx.x / kWarpSize;
  const int64_t output = warp * kInt8Outputs;
  if (output >= args.out) return;  // whole warps
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const int8_t* weights[kInt8Outputs];  // an odd end repeats the last output
#pragma unroll
  for (int o = 0; o < kInt8Outputs; ++o) {
    const int64_t own = output + o < args.out ? output + o : args.out - 1;
    weights[o] = static_cast<const int8_t*>(args.weight) + own * args.in;
  }
  const T* rows[kRows];
  tile_rows(args, first, rows);
  float sums[kInt8Outputs][kRows] = {};
  constexpr int kPart = kWidth < 4 ? kWidth : 4;
#pragma unroll 2
  for (int64_t at = lane * kWidth; at < args.in; at += kWarpSize * kWidth) {
    int8_t raw[kInt8Outputs][kWidth];
#pragma unroll
    for (int o = 0; o < kInt8Outputs; ++o) load_vector(weights[o] + at, raw[o]);
#pragma unroll
    for (int part = 0; part < kWidth; part += kPart) {
      float w[kInt8Outputs][kPart];
#pragma unroll
      for (int o = 0; o < kInt8Outputs; ++o) widen(raw[o] + part, w[o]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[kPart];
        load_floats(rows[r] + at + part, v);
#pragma unroll
        for (int o = 0; o < kInt8Outputs; ++o) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) sums[o][r] += w[o][i] * v[i];
        }
      }
    }
  }
#pragma unroll
  for (int o = 0; o < kInt8Outputs; ++o) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = warp_sum(sums[o][r]);
      if (lane == 0 && first + r < args.rows && output + o < args.out) {
        static_cast<T*>(args.y)[(first + r) * args.out + output + o] =
            from_float<T>(sum * args.scale[output + o]);
      }
    }
  }
}

}  // namespace kelix::cuda
