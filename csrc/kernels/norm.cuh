// RMSNorm (with the residual add) and LayerNorm: one CTA per row, float32 statistics.
#pragma once

#include "common/device.cuh"
#include "common/norm.h"

namespace kelix::cuda {

inline constexpr int kNormThreads = 256;

template <class T>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormArgs args) {
  KELIX_SHARED(float, scratch, [kNormThreads / kWarpSize]);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * args.cols;
  const T* x = static_cast<const T*>(args.x) + offset;
  T* residual = args.residual != nullptr ? static_cast<T*>(args.residual) + offset : nullptr;
  const T* weight = static_cast<const T*>(args.weight);
  T* y = static_cast<T*>(args.y) + offset;

  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < args.cols; c += kNormThreads) {
    float v = to_float(x[c]);
    if (residual != nullptr) {
      residual[c] = from_float<T>(to_float(residual[c]) + v);
      v = to_float(residual[c]);
    }
    square_sum += v * v;
  }
  const float scale = rsqrtf(cta_sum(square_sum, scratch) / args.cols + args.eps);
  const T* source = residual != nullptr ? residual : x;
  for (int64_t c = threadIdx.x; c < args.cols; c += kNormThreads) {
    y[c] = from_float<T>(round_to<T>(to_float(source[c]) * scale) * to_float(weight[c]));
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) layer_norm_kernel(LayerNormArgs args) {
  KELIX_SHARED(float, scratch, [kNormThreads / kWarpSize]);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * args.cols;
  const T* x = static_cast<const T*>(args.x) + offset;
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y) + offset;

  float sum = 0;
  for (int64_t c = threadIdx.x; c < args.cols; c += kNormThreads) sum += to_float(x[c]);
  const float rough_mean = cta_sum(sum, scratch) / args.cols;
  // Two passes: the one-pass variance loses all its digits on rows far from zero. The second also
  // finds what rounding left in the mean.
  float left_over = 0;
  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < args.cols; c += kNormThreads) {
    const float v = to_float(x[c]) - rough_mean;
    left_over += v;
    square_sum += v * v;
  }
  left_over = cta_sum(left_over, scratch) / args.cols;
  const float variance = cta_sum(square_sum, scratch) / args.cols - left_over * left_over;
  const float scale = rsqrtf(variance + args.eps);
  for (int64_t c = threadIdx.x; c < args.cols; c += kNormThreads) {
    const float gain = weight != nullptr ? to_float(weight[c]) : 1.0f;
    const float shift = bias != nullptr ? to_float(bias[c]) : 0.0f;
    const float v = to_float(x[c]) - rough_mean - left_over;
    y[c] = from_float<T>(v * scale * gain + shift);
  }
}

}  // namespace kelix::cuda
