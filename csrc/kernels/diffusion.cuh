// The elementwise work of a SANA block and of the Euler sampler.
#pragma once

#include "common/diffusion.h"
#include "kernels/row.cuh"

namespace kelix::cuda {

// One CTA per row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads, 1) modulate_kernel(ModulateArgs args) {
  KELIX_SHARED(float, scratch, [kMaxRowWarps]);
  const int64_t row = blockIdx.x;
  const int64_t batch = blockIdx.x / static_cast<unsigned>(args.tokens);
  T* y = static_cast<T*>(args.y) + row * args.cols;
  const HeldRow<T, kWidth> x(static_cast<const T*>(args.x) + row * args.cols, args.cols);
  const HeldRow<T, kWidth> scale(static_cast<const T*>(args.scale) + batch * args.cols, args.cols);
  const HeldRow<T, kWidth> shift(static_cast<const T*>(args.shift) + batch * args.cols, args.cols);

  const RowStats stats = row_stats(x, args.cols, args.eps, scratch);
  for_each_piece<kWidth>(args.cols, [&](int64_t at, int piece) {
    float v[kWidth];
    float gain[kWidth];
    float offset[kWidth];
    x.get(at, piece, v);
    scale.get(at, piece, gain);
    shift.get(at, piece, offset);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float normed = (v[i] - stats.mean - stats.left_over) * stats.scale;
      v[i] = normed * (1.0f + gain[i]) + offset[i];
    }
    store_floats(y + at, v);
  });
}

// One CTA per row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads) gated_residual_kernel(GatedResidualArgs args) {
  const int64_t row = blockIdx.x;
  const int64_t batch = blockIdx.x / static_cast<unsigned>(args.tokens);
  T* x = static_cast<T*>(args.x) + row * args.cols;
  const HeldRow<T, kWidth> before(x, args.cols);
  const HeldRow<T, kWidth> y(static_cast<const T*>(args.y) + row * args.cols, args.cols);
  const HeldRow<T, kWidth> gate(static_cast<const T*>(args.gate) + batch * args.cols, args.cols);
  for_each_piece<kWidth>(args.cols, [&](int64_t at, int piece) {
    float v[kWidth];
    float addend[kWidth];
    float factor[kWidth];
    before.get(at, piece, v);
    y.get(at, piece, addend);
    gate.get(at, piece, factor);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] += factor[i] * addend[i];
    store_floats(x + at, v);
  });
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kPieceThreads) euler_step_kernel(EulerStepArgs args) {
  const int64_t row = blockIdx.x;
  float* latent = args.latent + row * args.cols;
  const T* velocity = static_cast<const T*>(args.velocity) + row * args.cols;
  const T* uncond = static_cast<const T*>(args.uncond) + row * args.cols;
  const float dt = args.dt[row];
  for_each_own_piece<kWidth>(args.cols, [&](int64_t at) {
    float state[kWidth];
    float step[kWidth];
    load_floats(latent + at, state);
    load_floats(velocity + at, step);
    if (args.uncond != nullptr) {
      float base[kWidth];
      load_floats(uncond + at, base);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        step[i] = base[i] + args.guidance[row] * (step[i] - base[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) state[i] += dt * step[i];
    store_floats(latent + at, state);
  });
}

}  // namespace kelix::cuda
