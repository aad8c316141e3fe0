#include "cpu/norm.h"

#include <cmath>

#include "cpu/row_stats.h"
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
    const float scale = 1.0f / std::sqrt(mean_square(x, args.cols) + args.eps);
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
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.cols;
    const T* weight = weight_row(static_cast<const T*>(args.weight), args, row);
    const T* bias = weight_row(static_cast<const T*>(args.bias), args, row);
    T* y = static_cast<T*>(args.y) + row * args.cols;
    const RowStats stats = row_stats(x, args.cols, args.eps);
#pragma omp simd
    for (int64_t c = 0; c < args.cols; ++c) {
      const float gain = weight != nullptr ? to_float(weight[c]) : 1.0f;
      const float shift = bias != nullptr ? to_float(bias[c]) : 0.0f;
      y[c] = from_float<T>(stats.normed(to_float(x[c])) * gain + shift);
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
