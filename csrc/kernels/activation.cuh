// silu(gate) * up.
#pragma once

#include "common/activation.h"
#include "kernels/activate.cuh"
#include "kernels/row.cuh"

namespace kelix::cuda {

template <class T, int kWidth>
__global__ void __launch_bounds__(kPieceThreads) silu_mul_kernel(SiluMulArgs args) {
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * 2 * args.cols;
  T* y = static_cast<T*>(args.y) + row * args.cols;
  for_each_own_piece<kWidth>(args.cols, [&](int64_t at) {
    float gate[kWidth];
    float up[kWidth];
    load_floats(x + at, gate);
    load_floats(x + args.cols + at, up);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) gate[i] = silu<T>(gate[i]) * up[i];
    store_floats(y + at, gate);
  });
}

}  // namespace kelix::cuda
