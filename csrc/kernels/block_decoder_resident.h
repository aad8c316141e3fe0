// The whole in-block loop in one launch, for the launcher of the block_decoder stem.
#pragma once

#include "common/block_decoder.h"

namespace kelix::cuda {

// False, and nothing launched, where the batch is too large or the kernel does not fit the device.
bool block_decode_resident(const BlockDecoderArgs& args, void* stream);

}  // namespace kelix::cuda
