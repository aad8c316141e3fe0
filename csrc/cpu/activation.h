// CPU kernels of the activation stem.
#pragma once

#include "common/activation.h"
#include "common/isa.h"

namespace kelix {

KELIX_FOR_EACH_ISA(void silu_mul(const SiluMulArgs& args, int64_t begin, int64_t end);)

}  // namespace kelix
