// Arguments of the norm stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

// y = weight * round(x / sqrt(mean(x^2) + eps)) over rows of `cols`. With `residual`, x is added to
// it in place first and the sum is what is normalised.
struct RmsNormArgs {
  const void* x;
  void* residual;  // may be null
  const void* weight;
  void* y;
  int64_t rows;
  int64_t cols;
  float eps;
  DType dtype;
};

// y = (x - mean) / sqrt(var + eps) * weight + bias, biased variance. Row r takes row
// r % weight_rows of weight and bias.
struct LayerNormArgs {
  const void* x;
  const void* weight;  // [weight_rows, cols], may be null
  const void* bias;    // [weight_rows, cols], may be null
  void* y;
  int64_t rows;
  int64_t cols;
  int64_t weight_rows;
  float eps;
  DType dtype;
};

}  // namespace kelix
