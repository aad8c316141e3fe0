// How the threads of a CTA share a row: pieces of kWidth elements, dealt out in turn. A thread's
// first pieces stay in registers between the passes over a row, so that a row of common length is
// read from memory once; what lies beyond them is read again.
#pragma once

#include <algorithm>

#include "common/ceil_div.h"
#include "common/vector.cuh"

namespace kelix::cuda {

// Leaves a thread 80 registers: with them 1,024 rows of 96 threads, the release's, are resident on
// 132 multiprocessors at once.
inline constexpr int kMaxRowThreads = 768;
inline constexpr int kMaxRowWarps = kMaxRowThreads / kWarpSize;
inline constexpr int kHeldPieces = 4;  // of one thread: 24,576 16-bit elements of a row
inline constexpr int kNotHeld = -1;

// As few warps as hold the row: the fewer take part in a sum, the sooner it is there.
inline unsigned row_threads(int64_t cols, int width) {
  constexpr int64_t kWarpPieces = kHeldPieces * kWarpSize;
  const int64_t pieces = ceil_div(cols, width);
  const int64_t warps = ceil_div(pieces, kWarpPieces);
  return static_cast<unsigned>(std::clamp<int64_t>(warps, 1, kMaxRowWarps) * kWarpSize);
}

// Calls f(first element, piece) for this thread's pieces; `piece` is kNotHeld past the held ones.
template <int kWidth, class F>
__device__ __forceinline__ void for_each_piece(int64_t cols, const F& f) {
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
  int64_t at = static_cast<int64_t>(threadIdx.x) * kWidth;
#pragma unroll
  for (int piece = 0; piece < kHeldPieces; ++piece, at += stride) {
    if (at < cols) f(at, piece);
  }
  for (; at < cols; at += stride) f(at, kNotHeld);
}

// This thread's pieces of one row.
template <class T, int kWidth>
class HeldRow {
 public:
  // Issues all loads, so that those of several rows are in flight together. A null source is never
  // read.
  __device__ __forceinline__ HeldRow(const T* source, int64_t cols) : source_(source) {
    if (source == nullptr) return;
    const int64_t stride = static_cast<int64_t>(blockDim.x) * kWidth;
    int64_t at = static_cast<int64_t>(threadIdx.x) * kWidth;
#pragma unroll
    for (int piece = 0; piece < kHeldPieces; ++piece, at += stride) {
      if (at < cols) load_vector(source + at, held_[piece]);
    }
  }

  __device__ __forceinline__ void get(int64_t at, int piece, float (&values)[kWidth]) const {
    if (piece == kNotHeld) {
      load_floats(source_ + at, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = to_float(held_[piece][i]);
  }

  // Adds x, writes the rounded sum to `sum` and is that row from now on.
  __device__ __forceinline__ void add(const HeldRow& x, T* sum, int64_t cols) {
    for_each_piece<kWidth>(cols, [&](int64_t at, int piece) {
      float mine[kWidth];
      float other[kWidth];
      T total[kWidth];
      get(at, piece, mine);
      x.get(at, piece, other);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[i] = from_float<T>(mine[i] + other[i]);
      store_vector(sum + at, total);
      if (piece != kNotHeld) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) held_[piece][i] = total[i];
      }
    });
    source_ = sum;
  }

 private:
  const T* source_;
  T held_[kHeldPieces][kWidth];
};

// The mean of a row, the same in every thread. `scratch` holds one float per warp.
template <class T, int kWidth>
__device__ __forceinline__ float row_mean(const HeldRow<T, kWidth>& row, int64_t cols,
                                          float* scratch) {
  float sum = 0;
  for_each_piece<kWidth>(cols, [&](int64_t at, int piece) {
    float v[kWidth];
    row.get(at, piece, v);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum += v[i];
  });
  return cta_sum(sum, scratch) / cols;
}

// A row's mean, in two parts: rounded, and what rounding left. scale is 1 / sqrt(variance + eps).
struct RowStats {
  float mean;
  float left_over;
  float scale;
};

// Two passes: the one-pass variance loses all its digits on rows far from zero. The second also
// finds what rounding left in the mean. The same for every thread of a CTA, which calls it
// together.
template <class T, int kWidth>
__device__ __forceinline__ RowStats row_stats(const HeldRow<T, kWidth>& row, int64_t cols,
                                              float eps, float* scratch) {
  const float mean = row_mean(row, cols, scratch);
  float left_over = 0;
  float square_sum = 0;
  for_each_piece<kWidth>(cols, [&](int64_t at, int piece) {
    float v[kWidth];
    row.get(at, piece, v);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      v[i] -= mean;
      left_over += v[i];
      square_sum += v[i] * v[i];
    }
  });
  left_over = cta_sum(left_over, scratch) / cols;
  const float variance = cta_sum(square_sum, scratch) / cols - left_over * left_over;
  // Rounding can leave a little less than nothing of equal values.
  return {mean, left_over, rsqrtf((variance < 0.0f ? 0.0f : variance) + eps)};
}

// Elementwise kernels: one piece per thread where the grid is large enough. A row is blockIdx.x,
// its pieces are spread over blockIdx.y.
inline constexpr int64_t kPieceThreads = 256;  // at most

struct PieceGrid {
  dim3 grid;
  dim3 block;
};

inline PieceGrid piece_grid(int64_t rows, int64_t cols, int width) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t pieces = ceil_div(cols, width);
  const int64_t ctas = std::min(ceil_div(pieces, kPieceThreads), kMaxGridY);
  const int64_t share = std::min(ceil_div(pieces, ctas), kPieceThreads);
  const int64_t warps = ceil_div(share, kWarpSize);
  return {dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ctas)),
          dim3(static_cast<unsigned>(warps * kWarpSize))};
}

// Calls f(first element) for this thread's pieces of the row.
template <int kWidth, class F>
__device__ __forceinline__ void for_each_own_piece(int64_t cols, const F& f) {
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * kWidth;
  const int64_t first = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kWidth;
  for (int64_t at = first; at < cols; at += stride) f(at);
}

}  // namespace kelix::cuda
