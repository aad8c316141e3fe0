// silu(gate) * up: one thread per output element, a grid-stride loop over the rows.
#pragma once

#include "common/activation.h"
#include "common/device.cuh"

namespace kelix::cuda {

inline constexpr int kActivationThreads = 256;

template <class T>
__global__ void __launch_bounds__(kActivationThreads) silu_mul_kernel(SiluMulArgs args) {
  const int64_t total = args.rows * args.cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kActivationThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kActivationThreads + threadIdx.x; i < total;
       i += stride) {
    const int64_t row = i / args.cols;
    const T* gate = static_cast<const T*>(args.x) + i + row * args.cols;
    const float g = to_float(gate[0]);
    static_cast<T*>(args.y)[i] = from_float<T>(g / (1.0f + expf(-g)) * to_float(gate[args.cols]));
  }
}

}  // namespace kelix::cuda
