// CPU kernel of the linear stem.
#pragma once

#include "common/isa.h"
#include "common/linear.h"
#include "common/parallel.h"

namespace kelix {

KELIX_FOR_EACH_ISA(void skinny_linear(const SkinnyLinearArgs& args, const ParallelFor& parallel);)

}  // namespace kelix
