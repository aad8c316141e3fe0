// CPU kernels of the norm stem; each works on the rows [begin, end).
#pragma once

#include "common/isa.h"
#include "common/norm.h"

namespace kelix {

KELIX_FOR_EACH_ISA(void rms_norm(const RmsNormArgs& args, int64_t begin, int64_t end);
                   void layer_norm(const LayerNormArgs& args, int64_t begin, int64_t end);)

}  // namespace kelix
