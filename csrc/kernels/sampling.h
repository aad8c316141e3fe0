// CUDA launcher of the sampling stem; null, or the text of the launch error.
#pragma once

#include "common/sampling.h"

namespace kelix::cuda {

const char* sample_blocks(const SampleArgs& args, void* stream);

}  // namespace kelix::cuda
