// Arguments of the gradients stem: backward passes of elementwise and small operators, float32.
#pragma once

#include <cstdint>

#include "common/diffusion.h"

namespace kelix {

// Of y = normed(x) * gain + shift over rows of `cols`. Row r has the gain of group r / group; rows
// of a group are worked on in `pieces` of kGradientRows.
struct NormBackwardArgs {
  const float* grad;  // [rows, cols]
  const float* x;     // [rows, cols]
  const float* gain;  // [rows / group, cols], may be null for 1
  float* dx;          // [rows, cols]
  float* sums;        // [rows / group, pieces, 2, cols]: of grad * normed and of grad
  int64_t rows;
  int64_t cols;
  int64_t group;
  int64_t pieces;
  bool centred;  // LayerNorm, not RMSNorm
  float eps;
};

// A sum over rows is taken in pieces of so many: it does not depend on the number of threads.
inline constexpr int64_t kGradientRows = 64;

// Of y[row, c] = silu(x[row, c]) * x[row, cols + c]
struct SiluMulBackwardArgs {
  const float* grad;  // [rows, cols]
  const float* x;     // [rows, 2 * cols]
  float* dx;          // [rows, 2 * cols]
  int64_t rows;
  int64_t cols;
};

// Of attention with ReLU features (LinearAttentionArgs), q and k already normed.
struct LinearAttentionBackwardArgs {
  const float* grad;  // [batch, tokens, heads * head_dim]
  const float* qkv;   // [batch, tokens, 3 * heads * head_dim]
  float* dqkv;        // like qkv
  float* workspace;   // [slots, linear_attention_backward_floats]
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t stride;  // head_dim rounded up to kStatePad
  int64_t slots;   // workers
  float eps;
};

// Of depthwise_glu (DepthwiseGluArgs). Every picture has sums of its own for weight and bias.
struct DepthwiseGluBackwardArgs {
  DepthwiseGluArgs forward;  // without y and workspace
  const float* grad;         // [batch, height, width, channels]
  float* dx;                 // [batch, height, width, 2 * channels]
  float* dweight;            // [batch, 2 * channels, 3, 3]
  float* dbias;              // [batch, 2 * channels]
  float* workspace;          // [slots, depthwise_backward_floats(height, width)]
};

}  // namespace kelix
