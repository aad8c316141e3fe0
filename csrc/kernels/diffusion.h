// CUDA launchers of the diffusion stem. Each returns null, or the text of the launch error.
#pragma once

#include "common/diffusion.h"

namespace kelix::cuda {

const char* modulate(const ModulateArgs& args, void* stream);
const char* gated_residual(const GatedResidualArgs& args, void* stream);
const char* relu_linear_attention(const LinearAttentionArgs& args, void* stream);
const char* depthwise_glu(const DepthwiseGluArgs& args, void* stream);
const char* euler_step(const EulerStepArgs& args, void* stream);

}  // namespace kelix::cuda
