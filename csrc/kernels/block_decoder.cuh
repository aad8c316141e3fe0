// The steps of one slot of the in-block loop, a kernel each. All rows run every slot, so that the
// launches are the same for any content; rows that are done are skipped when ids are written.
#pragma once

#include "kernels/block_decoder_parts.cuh"

namespace kelix::cuda {

inline constexpr int kLinearWarps = 8;

template <class T>
__global__ void __launch_bounds__(kDecoderThreads)
    slot_input_kernel(BlockDecoderArgs args, int64_t slot) {
  const int64_t row = blockIdx.x;
  const int64_t last_id = slot > 0 ? args.ids[row * (args.num_codes + 1) + slot - 1] : 0;
  const T* source = slot_input<T>(args, row, slot, last_id);
  float* input = args.work.input + row * args.input_dim;
  for (int64_t c = threadIdx.x; c < args.input_dim; c += kDecoderThreads) {
    input[c] = to_float(source[c]);
  }
}

// A warp per kOutputs outputs and tile of kRows rows. The tiles of the same outputs are neighbours
// in the grid, so that all but the first find their weights in the L2.
template <class T, int kOutputs, int kRows, bool kWide>
__global__ void __launch_bounds__(kLinearWarps* kWarpSize) linear_kernel(LinearArgs<T> args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = static_cast<int64_t>(blockIdx.y) * kLinearWarps + threadIdx.x / kWarpSize;
  const int64_t first = warp * kOutputs;
  if (first >= args.out) return;  // whole warps
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const T* weights[kOutputs];
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    weights[o] = args.weight + (first + o < args.out ? first + o : args.out - 1) * args.in;
  }
  const float* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < args.batch ? first_row + r : args.batch - 1;
    rows[r] = args.x + row * args.in;
  }
  float sums[kOutputs][kRows] = {};
  add_products<T, kOutputs, kRows, kWide>(weights, rows, static_cast<int>(args.in),
                                          cache_normally(), sums);
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = warp_sum(sums[o][r]);
      const bool present = first + o < args.out && first_row + r < args.batch;
      if (lane == 0 && present) store_output(args, first_row + r, first + o, sum);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kDecoderThreads)
    decoder_layer_norm_kernel(const float* x, const T* weight, const T* bias, float* y,
                              int64_t cols) {
  KELIX_SHARED(float, scratch, [kDecoderWarps]);
  x += blockIdx.x * cols;
  y += blockIdx.x * cols;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) sum += x[c];
  const float mean = cta_sum(sum, scratch) / cols;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    squares += squared_distance(x[c], mean);
  }
  const float scale = layer_norm_scale(cta_sum(squares, scratch), cols);
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    y[c] = layer_norm_value(x[c], mean, scale, to_float(weight[c]), to_float(bias[c]));
  }
}

// The norm in front of the head, in place.
template <class T>
__global__ void __launch_bounds__(kDecoderThreads) head_norm_kernel(BlockDecoderArgs args) {
  KELIX_SHARED(float, scratch, [kDecoderWarps]);
  const int64_t cols = args.input_dim;
  const T* weight = static_cast<const T*>(args.head_norm);
  float* x = args.work.output + blockIdx.x * cols;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) squares += x[c] * x[c];
  const float scale = head_norm_scale(cta_sum(squares, scratch), cols, args.norm_eps);
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    x[c] *= scale * to_float(weight[c]);
  }
}

// One warp per (row, head).
static __global__ void __launch_bounds__(kWarpSize)
    slot_attention_kernel(BlockDecoderArgs args, int64_t layer, int64_t slot) {
  const int64_t row = blockIdx.x, d = args.d_model;
  const int64_t head_dim = d / args.num_heads, start = blockIdx.y * head_dim;
  const float* qkv = args.work.qkv + row * 3 * d + start;
  float* cache = slot_cache(args, row, layer) + start;
  attend(qkv, cache, d, head_dim, slot, args.work.mixed + row * d + start);
  store_key_value(qkv, cache, d, head_dim, slot);
}

static __global__ void __launch_bounds__(kDecoderThreads)
    decoder_silu_mul_kernel(BlockDecoderArgs args) {
  const int64_t row = blockIdx.x;
  const float* gate = args.work.gate_up + row * 2 * args.ffn;
  float* out = args.work.activated + row * args.ffn;
  for (int64_t c = threadIdx.x; c < args.ffn; c += kDecoderThreads) {
    out[c] = silu_mul(gate[c], gate[args.ffn + c]);
  }
}

// The same for the whole CTA.
__device__ __forceinline__ bool was_done(const BlockDecoderArgs& args, int64_t row, int64_t slot) {
  const int64_t* ids = args.ids + row * (args.num_codes + 1);
  return slot > 0 && (is_done(args, 0, ids[0]) || is_done(args, slot - 1, ids[slot - 1]));
}

static __global__ void __launch_bounds__(kDrawThreads)
    draw_slot_kernel(BlockDecoderArgs args, int64_t slot) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t row = blockIdx.x, width = head_slice(args, slot).width;
  if (was_done(args, row, slot)) return;
  mask_banned_id(args, row, slot);
  float* workspace = args.work.sampling + row * draw_workspace(width);
  store_slot(args, row, slot,
             draw_row(slot_logits(args, row, slot), width, rule_of_slot(args, row, slot), workspace,
                      shared));
}

// The rounds of a slot whose rows are wide (sampling_wide.cuh); a grid of (chunks, rows) for two of
// them and of rows for the last.
static __global__ void __launch_bounds__(kDrawThreads)
    summarise_slot_kernel(BlockDecoderArgs args, int64_t slot) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t row = blockIdx.y;
  if (was_done(args, row, slot)) return;
  const int chunk = static_cast<int>(blockIdx.x);
  if (args.banned_id / kWideChunk == chunk) mask_banned_id(args, row, slot);
  summarise_chunk(wide_slot_row(args, row, slot), chunk, rule_of_slot(args, row, slot), shared);
}

static __global__ void __launch_bounds__(kDrawThreads)
    gather_slot_kernel(BlockDecoderArgs args, int64_t slot) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t row = blockIdx.y;
  if (was_done(args, row, slot)) return;
  gather_chunk(wide_slot_row(args, row, slot), static_cast<int>(blockIdx.x),
               rule_of_slot(args, row, slot), shared);
}

static __global__ void __launch_bounds__(kDrawThreads)
    finish_slot_kernel(BlockDecoderArgs args, int64_t slot) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t row = blockIdx.x;
  if (was_done(args, row, slot)) return;
  store_slot(
      args, row, slot,
      finish_wide_row(wide_slot_row(args, row, slot), rule_of_slot(args, row, slot), shared));
}

}  // namespace kelix::cuda
