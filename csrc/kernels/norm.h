// CUDA launchers of the norm stem. Each returns null, or the text of the launch error.
#pragma once

#include "common/norm.h"

namespace kelix::cuda {

const char* rms_norm(const RmsNormArgs& args, void* stream);
const char* layer_norm(const LayerNormArgs& args, void* stream);

}  // namespace kelix::cuda
