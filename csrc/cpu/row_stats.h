// Means and deviations of a row for the norms. Sums are taken in blocks: rounding then grows with
// the block and the number of blocks, not with the row, whatever the width of a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

namespace kelix {
namespace {

constexpr int64_t kSumBlock = 1024;

// Mean of the squares of x[0, cols).
template <class T>
float mean_square(const T* x, int64_t cols) {
  float total = 0;
  for (int64_t begin = 0; begin < cols; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, cols);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; ++c) sum += to_float(x[c]) * to_float(x[c]);
    total += sum;
  }
  return total / static_cast<float>(cols);
}

struct RowStats {
  float mean;
  float left_over;  // what rounding left in the mean
  float scale;      // 1 / sqrt(variance + eps)

  float normed(float v) const { return (v - mean - left_over) * scale; }
};

// Two passes: the one-pass variance loses all its digits on rows far from zero.
template <class T>
RowStats row_stats(const T* x, int64_t cols, float eps) {
  const float inv_cols = 1.0f / static_cast<float>(cols);
  float total = 0;
  for (int64_t begin = 0; begin < cols; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, cols);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = begin; c < end; ++c) sum += to_float(x[c]);
    total += sum;
  }
  const float mean = total * inv_cols;
  float left_over = 0;
  float square_sum = 0;
  for (int64_t begin = 0; begin < cols; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, cols);
    float sum = 0;
    float squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t c = begin; c < end; ++c) {
      const float v = to_float(x[c]) - mean;
      sum += v;
      squares += v * v;
    }
    left_over += sum;
    square_sum += squares;
  }
  left_over *= inv_cols;
  // Rounding can leave a little less than nothing of equal values.
  const float variance = std::max(square_sum * inv_cols - left_over * left_over, 0.0f);
  return {mean, left_over, 1.0f / std::sqrt(variance + eps)};
}

}  // namespace
}  // namespace kelix
