#include "cpu/norm.h"

#include <cmath>

#include "cpu/simd.h"

namespace kelix::KELIX_ISA {
namespace {

template <class T>
void rms_norm_rows(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.cols;
    T* y = static_cast<T*>(args.y) + row * args.cols;
    if (args.residual != nullptr) {
      T* residual = static_cast<T*>(args.residual) + row * args.cols;
#pragma omp simd
      for (int64_t c = 0; c < args.cols; ++c) {
        residual[c] = from_float<T>(to_float(residual[c]) + to_float(x[c]));
      }
      x = residual;
    }
    float square_sum = 0;
#pragma omp simd reduction(+ : square_sum)
    for (int64_t c = 0; c < args.cols; ++c) {
      const float v = to_float(x[c]);
      square_sum += v * v;
    }
    const float scale = 1.0f / std::sqrt(square_sum / static_cast<float>(args.cols) + args.eps);
#pragma omp simd
    for (int64_t c = 0; c < args.cols; ++c) {
      y[c] = from_float<T>(round_to<T>(to_float(x[c]) * scale) * to_float(weight[c]));
    }
  }
}

template <class T>
const T* weight_row(const T* weights, const LayerNormArgs& args, int64_t row) {
  return weights != nullptr ? weights + row % args.weight_rows * args.cols : nullptr;
}

template <class T>
void layer_norm_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const float inv_cols = 1.0f / static_cast<float>(args.cols);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.cols;
    const T* weight = weight_row(static_cast<const T*>(args.weight), args, row);
    const T* bias = weight_row(static_cast<const T*>(args.bias), args, row);
    T* y = static_cast<T*>(args.y) + row * args.cols;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < args.cols; ++c) sum += to_float(x[c]);
    const float rough_mean = sum * inv_cols;
    // Two passes: the one-pass variance loses all its digits on rows far from zero. The second also
    // finds what rounding left in the mean.
    float left_over = 0;
    float square_sum = 0;
#pragma omp simd reduction(+ : left_over, square_sum)
    for (int64_t c = 0; c < args.cols; ++c) {
      const float v = to_float(x[c]) - rough_mean;
      left_over += v;
      square_sum += v * v;
    }
    left_over *= inv_cols;
    const float variance = square_sum * inv_cols - left_over * left_over;
    const float scale = 1.0f / std::sqrt(variance + args.eps);
#pragma omp simd
    for (int64_t c = 0; c < args.cols; ++c) {
      const float gain = weight != nullptr ? to_float(weight[c]) : 1.0f;
      const float shift = bias != nullptr ? to_float(bias[c]) : 0.0f;
      const float v = to_float(x[c]) - rough_mean - left_over;
      y[c] = from_float<T>(v * scale * gain + shift);
    }
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { rms_norm_rows<decltype(type)>(args, begin, end); });
}

void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { layer_norm_rows<decltype(type)>(args, begin, end); });
}

}  // namespace kelix::KELIX_ISA
