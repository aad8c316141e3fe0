// RMSNorm (with the residual add) and LayerNorm: one CTA per row, float32 statistics.
#pragma once

#include "common/norm.h"
#include "kernels/row.cuh"

namespace kelix::cuda {

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads) rms_norm_kernel(RmsNormArgs args) {
  KELIX_SHARED(float, scratch, [kMaxRowWarps]);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * args.cols;
  T* residual = args.residual != nullptr ? static_cast<T*>(args.residual) + offset : nullptr;
  T* y = static_cast<T*>(args.y) + offset;
  HeldRow<T, kWidth> x(static_cast<const T*>(args.x) + offset, args.cols);
  const HeldRow<T, kWidth> before(residual, args.cols);
  const HeldRow<T, kWidth> weight(static_cast<const T*>(args.weight), args.cols);
  if (residual != nullptr) x.add(before, residual, args.cols);

  float square_sum = 0;
  for_each_piece<kWidth>(args.cols, [&](int64_t at, int piece) {
    float v[kWidth];
    x.get(at, piece, v);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) square_sum += v[i] * v[i];
  });
  const float scale = rsqrtf(cta_sum(square_sum, scratch) / args.cols + args.eps);
  for_each_piece<kWidth>(args.cols, [&](int64_t at, int piece) {
    float v[kWidth];
    float gain[kWidth];
    x.get(at, piece, v);
    weight.get(at, piece, gain);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = round_to<T>(v[i] * scale) * gain[i];
    store_floats(y + at, v);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads) layer_norm_kernel(LayerNormArgs args) {
  KELIX_SHARED(float, scratch, [kMaxRowWarps]);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * args.cols;
  T* y = static_cast<T*>(args.y) + offset;
  const HeldRow<T, kWidth> x(static_cast<const T*>(args.x) + offset, args.cols);
  const int64_t weight_row = blockIdx.x % args.weight_rows * args.cols;
  const auto row_of = [&](const void* weights) {
    return weights != nullptr ? static_cast<const T*>(weights) + weight_row : nullptr;
  };
  const HeldRow<T, kWidth> weight(row_of(args.weight), args.cols);
  const HeldRow<T, kWidth> bias(row_of(args.bias), args.cols);

  const RowStats stats = row_stats(x, args.cols, args.eps, scratch);
  for_each_piece<kWidth>(args.cols, [&](int64_t at, int piece) {
    float v[kWidth];
    x.get(at, piece, v);
    float gain[kWidth];
    float shift[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      gain[i] = 1.0f;
      shift[i] = 0.0f;
    }
    if (args.weight != nullptr) weight.get(at, piece, gain);
    if (args.bias != nullptr) bias.get(at, piece, shift);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      v[i] = (v[i] - stats.mean - stats.left_over) * stats.scale * gain[i] + shift[i];
    }
    store_floats(y + at, v);
  });
}

}  // namespace kelix::cuda
