// CPU kernels of the diffusion stem.
#pragma once

#include "common/diffusion.h"
#include "common/isa.h"

namespace kelix {

// Two of these tiles of tokens lie on the stack.
inline constexpr int64_t kMaxLinearHeadDim = 256;
inline constexpr int64_t kAttentionTokens = 32;

// depthwise_glu works on a band of rows and a block of channels at a time.
inline constexpr int64_t kDepthwiseRows = 32;
inline constexpr int64_t kDepthwiseChannels = 128;

inline int64_t depthwise_pieces(const DepthwiseGluArgs& args) {
  const int64_t bands = (args.height + kDepthwiseRows - 1) / kDepthwiseRows;
  const int64_t blocks = (args.channels + kDepthwiseChannels - 1) / kDepthwiseChannels;
  return args.batch * bands * blocks;
}

// Scratch of one worker: three activated rows with a zero pixel at each end, for both halves of
// the channels, and one row of sums and gates.
inline int64_t depthwise_slot_floats(int64_t width) {
  return (3 * (width + 2) + width) * 2 * kDepthwiseChannels;
}

// Ranges: modulate, gated_residual, linear_attention_scales: rows of batch * tokens;
// linear_attention_state: heads of batch * heads, after the scales; linear_attention_output:
// tiles of batch * ceil(tokens / kAttentionTokens), after the states; depthwise_glu: workers of
// args.slots; euler_step: elements of batch * cols.
KELIX_FOR_EACH_ISA(
    void modulate(const ModulateArgs& args, int64_t begin, int64_t end);
    void gated_residual(const GatedResidualArgs& args, int64_t begin, int64_t end);
    void linear_attention_scales(const LinearAttentionArgs& args, int64_t begin, int64_t end);
    void linear_attention_state(const LinearAttentionArgs& args, int64_t begin, int64_t end);
    void linear_attention_output(const LinearAttentionArgs& args, int64_t begin, int64_t end);
    void depthwise_glu(const DepthwiseGluArgs& args, int64_t begin, int64_t end);
    void euler_step(const EulerStepArgs& args, int64_t begin, int64_t end);)

}  // namespace kelix
