// CUDA launcher of the linear stem. Returns null, or the text of the launch error.
#pragma once

#include "common/linear.h"

namespace kelix::cuda {

const char* skinny_linear(const SkinnyLinearArgs& args, void* stream);

}  // namespace kelix::cuda
