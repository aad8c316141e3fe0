// The activation functions of more than one stem.
#pragma once

#include "common/device.cuh"

namespace kelix::cuda {

// x / (1 + e^-x). The hardware's exponential and reciprocal are off by a few ulp of float32:
// nothing where the result is rounded to 16 bits, too much where it is not.
template <class T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x / (1.0f + expf(-x));
  } else {
    constexpr float kLog2E = 1.44269504f;
    return x * reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
  }
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }

}  // namespace kelix::cuda
