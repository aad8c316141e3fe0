// CUDA launchers of the codes stem. Each returns null, or the text of the launch error.
#pragma once

#include "common/codes.h"

namespace kelix::cuda {

const char* nearest_codes(const NearestCodesArgs& args, void* stream);
// The same on sm_90a by a CUTLASS product, where the build has it; z is normalised already.
const char* nearest_codes_cutlass(const NearestCodesArgs& args, void* stream);
const char* block_embed(const BlockEmbedArgs& args, void* stream);

}  // namespace kelix::cuda
