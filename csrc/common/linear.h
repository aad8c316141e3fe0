// Arguments of the linear stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

// y[row, o] = sum_i x[row, i] * weight[o, i], summed in float32; times scale[o] where weights are
// int8.
struct SkinnyLinearArgs {
  const void* x;       // [rows, in]
  const void* weight;  // [out, in]: of dtype, or int8 where there is a scale
  const float* scale;  // [out] or null
  void* y;             // [rows, out]
  float* workspace;    // CPU and not float32: rows * (in + out)
  int64_t rows;
  int64_t in;
  int64_t out;
  DType dtype;
};

}  // namespace kelix
