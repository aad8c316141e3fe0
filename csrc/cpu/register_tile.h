// The inner kernel of a matrix product: a few rows times a few vectors of columns, summed over the
// depth in registers.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace kelix {
namespace {

inline constexpr int kTileRows = kLanes == 16 ? 8 : 4;
inline constexpr int kTileVectors = kLanes == 4 ? 2 : 3;

// One vector register of float32, loaded from and stored to any float address.
using Vector = float __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

// out[r * out_stride + c] = sum_k rows[r][k * row_step] * columns[k * column_stride + c]
// for r < kTileRows and c < Vectors * kLanes; with Accumulate the sum is added to `out`.
template <int Vectors, bool Accumulate>
inline void register_tile(const float* const (&rows)[kTileRows], int64_t row_step,
                          const float* columns, int64_t column_stride, int64_t depth, float* out,
                          int64_t out_stride) {
  Vector sum[kTileRows][Vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector column[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      column[v] = *reinterpret_cast<const Vector*>(columns + k * column_stride + v * kLanes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const float factor = rows[r][k * row_step];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] += factor * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      Vector* target = reinterpret_cast<Vector*>(out + r * out_stride + v * kLanes);
      *target = Accumulate ? *target + sum[r][v] : sum[r][v];
    }
  }
}

// out[i, j] = sum_k a[k, i] * b[k, j], all rows `stride` long, i and j below it; with Accumulate it
// is added to `out`. stride: a multiple of kTileRows and of two vectors.
template <bool Accumulate>
inline void transposed_product(const float* a, const float* b, int64_t depth, int64_t stride,
                               float* out) {
  constexpr int kVectors = 2;
  for (int64_t i = 0; i < stride; i += kTileRows) {
    const float* rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) rows[r] = a + i + r;
    for (int64_t j = 0; j < stride; j += kVectors * kLanes) {
      register_tile<kVectors, Accumulate>(rows, stride, b + j, stride, depth, out + i * stride + j,
                                          stride);
    }
  }
}

}  // namespace
}  // namespace kelix
