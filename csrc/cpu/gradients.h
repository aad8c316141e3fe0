// CPU kernels of the gradients stem.
#pragma once

#include "common/gradients.h"
#include "common/isa.h"
#include "cpu/diffusion.h"

namespace kelix {

// Scratch of one head: q, k, v, the scaled gradient and one result [tokens, stride] each,
// three states [stride, stride], the key sum and its gradient.
inline int64_t linear_attention_backward_floats(int64_t tokens, int64_t stride) {
  const int64_t padded = (tokens + kAttentionTokens - 1) / kAttentionTokens * kAttentionTokens;
  return 5 * padded * stride + 3 * stride * stride + 2 * stride;
}

// Scratch of one worker: a block of channels of a whole picture, activated and as gradients of the
// convolution, both with a border of zeros; slopes of the activation; and rows of sums and gates.
inline int64_t depthwise_backward_floats(int64_t height, int64_t width) {
  const int64_t planes = 2 * (height + 2) * (width + 2) + height * width;
  return planes * 2 * kDepthwiseChannels + 3 * width * kDepthwiseChannels;
}

inline int64_t depthwise_backward_pieces(const DepthwiseGluArgs& args) {
  return args.batch * ((args.channels + kDepthwiseChannels - 1) / kDepthwiseChannels);
}

// Ranges: norm_backward: pieces of rows / group * pieces; silu_mul_backward: rows;
// linear_attention_backward: workers of slots; depthwise_glu_backward: workers of forward.slots.
KELIX_FOR_EACH_ISA(void norm_backward(const NormBackwardArgs& args, int64_t begin, int64_t end);
                   void silu_mul_backward(const SiluMulBackwardArgs& args, int64_t begin,
                                          int64_t end);
                   void linear_attention_backward(const LinearAttentionBackwardArgs& args,
                                                  int64_t begin, int64_t end);
                   void depthwise_glu_backward(const DepthwiseGluBackwardArgs& args, int64_t begin,
                                               int64_t end);)

}  // namespace kelix
