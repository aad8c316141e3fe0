// CUDA launcher of the block_decoder stem; null, or the text of the launch error.
#pragma once

#include "common/block_decoder.h"

namespace kelix::cuda {

// Only launches: no allocation and no synchronisation, so that a CUDA graph can hold it.
const char* block_decode(const BlockDecoderArgs& args, void* stream);

}  // namespace kelix::cuda
