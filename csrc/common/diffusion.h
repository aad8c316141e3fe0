// Arguments of the diffusion stem, shared by the CPU and CUDA kernels. `dtype` is the storage type
// of every void pointer.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

// y = LayerNorm(x) * (1 + scale) + shift
struct ModulateArgs {
  const void* x;      // [batch, tokens, cols]
  const void* shift;  // [batch, cols]
  const void* scale;  // [batch, cols]
  void* y;            // [batch, tokens, cols]
  int64_t batch;
  int64_t tokens;
  int64_t cols;
  float eps;
  DType dtype;
};

// x += gate * y
struct GatedResidualArgs {
  void* x;           // [batch, tokens, cols]
  const void* gate;  // [batch, cols]
  const void* y;     // [batch, tokens, cols]
  int64_t batch;
  int64_t tokens;
  int64_t cols;
  DType dtype;
};

// The state of one head is S [stride, stride] and then the key sum z [stride], zero past head_dim;
// stride is head_dim rounded up to this many floats.
inline constexpr int64_t kStatePad = 32;

// On CUDA a head's state is a sum of pieces, one per so many tokens. The split depends on nothing
// else, so that a result does not depend on the batch.
inline constexpr int64_t kStateTokens = 256;

// Per head: S = sum k^T v, z = sum k, y = q S / (q.z + eps), q and k after RMSNorm and ReLU.
struct LinearAttentionArgs {
  const void* qkv;     // [batch, tokens, 3 * heads * head_dim]
  const void* q_norm;  // [heads * head_dim] or null
  const void* k_norm;  // like q_norm, null together with it
  void* y;             // [batch, tokens, heads * head_dim]
  float* scales;       // [batch * tokens, 2]: 1 / RMS of q and k; null without norms
  float* states;       // [batch * heads, pieces, state_floats]
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t stride;
  int64_t state_floats;  // stride * (stride + 1)
  int64_t pieces;        // of a head's state: tokens / kStateTokens rounded up; 1 on the CPU
  float norm_eps;
  float eps;
  DType dtype;
};

enum class Activation : int32_t { kNone = 0, kSilu = 1, kGelu = 2 };

// y = a * gate_act(g) of (a | g) = depthwise 3x3(pre_act(x)) + bias, zero padding.
struct DepthwiseGluArgs {
  const void* x;       // [batch, height, width, 2 * channels]
  const void* weight;  // [2 * channels, 3, 3]
  const void* bias;    // [2 * channels]
  void* y;             // [batch, height, width, channels]
  float* workspace;    // CPU only: slots * depthwise_slot_floats(width) of csrc/cpu/diffusion.h
  int64_t slots;       // CPU only
  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t channels;
  Activation pre_act;
  Activation gate_act;
  DType dtype;
};

// latent += dt * (uncond + guidance * (velocity - uncond)); without uncond: latent += dt * velocity
struct EulerStepArgs {
  float* latent;          // [batch, cols]
  const void* velocity;   // [batch, cols]
  const void* uncond;     // [batch, cols] or null
  const float* dt;        // [batch]
  const float* guidance;  // [batch]; null together with uncond
  int64_t batch;
  int64_t cols;
  DType dtype;
};

}  // namespace kelix
