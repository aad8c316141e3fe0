// Arguments of the block_decoder stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace kelix {

// Where each tensor starts in the packed weights, in elements (the order and the alignment:
// BlockDecoderShape in kelix_rt/ops/block_decoder.py).
struct BlockDecoderLayout {
  int64_t input_weight, input_bias, position;
  int64_t first_layer, layer_size;
  // From the start of a layer.
  int64_t sa_norm_weight, sa_norm_bias, qkv_weight, qkv_bias, output_weight, output_bias;
  int64_t mlp_norm_weight, mlp_norm_bias, gate_up_weight, down_weight;
  // From the start of the packed weights again.
  int64_t final_weight, final_bias;
  int64_t size;
};

// Float32 scratch, allocated by the operator. B rows, n slots.
struct BlockDecoderWorkspace {
  float* input;        // [B, D] u, the input of the slot
  float* output;       // [B, D] z, and then its norm
  float* x;            // [B, d] residual stream
  float* normed;       // [B, d]
  float* qkv;          // [B, 3d]
  float* mixed;        // [B, d] attention output
  float* gate_up;      // [B, 2f]
  float* activated;    // [B, f]
  float* keys_values;  // [B, layers, n, 2d]
  float* logits;       // [B, widest slice of the head]
  float* sampling;     // [B, draw_workspace(widest slice)]
  int64_t* active;     // [B] rows still drawing, int64 (CPU)
  uint32_t* arrived;   // CTAs at the barriers of the grid, one uint32 (CUDA)
};

struct BlockDecoderArgs {
  const void* hidden;       // [B, D]
  const void* weights;      // packed
  const void* table;        // [VT, D]
  const void* head_norm;    // [D]
  const void* head;         // [VT, D]: of dtype, or int8 where there is a scale
  const float* head_scale;  // [VT] or null
  const float* params;      // [B, N + 1, 4]
  const int64_t* seeds;     // [B]
  const int64_t* steps;     // [B]
  int64_t* ids;             // [B, N + 1]
  float* logprobs;          // [B, N + 1]
  BlockDecoderLayout layout;
  BlockDecoderWorkspace work;
  int64_t batch, input_dim, num_codes, text_vocab, codes, block_end, banned_id;
  int64_t d_model, num_heads, num_layers, ffn;
  float norm_eps;
  DType dtype;
};

namespace {

constexpr float kDecoderNormEps = 1e-5f;

// The ids that a slot admits: [first, first + width).
struct HeadSlice {
  int64_t first, width;
};
[[maybe_unused]] KELIX_HOST_DEVICE constexpr HeadSlice head_slice(const BlockDecoderArgs& args,
                                                                  int64_t slot) {
  return slot == 0 ? HeadSlice{0, args.text_vocab + args.codes}
                   : HeadSlice{args.text_vocab + slot * args.codes, args.codes};
}

}  // namespace
}  // namespace kelix
