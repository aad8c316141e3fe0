// CUDA launchers of the activation stem. Each returns null, or the text of the launch error.
#pragma once

#include "common/activation.h"

namespace kelix::cuda {

const char* silu_mul(const SiluMulArgs& args, void* stream);

}  // namespace kelix::cuda
