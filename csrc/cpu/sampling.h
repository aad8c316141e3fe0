// CPU kernel of the sampling stem; it works on the rows [begin, end).
#pragma once

#include "common/isa.h"
#include "common/sampling.h"

namespace kelix {

// workspace: draw_workspace(cols) floats, not shared with another thread.
KELIX_FOR_EACH_ISA(void sample_blocks(const SampleArgs& args, float* workspace, int64_t begin,
                                      int64_t end);)

}  // namespace kelix
