// CPU kernel of the block_decoder stem: the whole in-block loop of a batch.
#pragma once

#include "common/block_decoder.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace kelix {

KELIX_FOR_EACH_ISA(void block_decode(const BlockDecoderArgs& args, const ParallelFor& parallel);)

}  // namespace kelix
