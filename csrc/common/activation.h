// Arguments of the activation stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

// y[row, c] = silu(x[row, c]) * x[row, cols + c]
struct SiluMulArgs {
  const void* x;  // [rows, 2 * cols]
  void* y;        // [rows, cols]
  int64_t rows;
  int64_t cols;
  DType dtype;
};

}  // namespace kelix
