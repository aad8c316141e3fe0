// The steps of one slot of the in-block loop. All rows run every slot, so that the launches are the
// same for any content; rows that are done are skipped when ids are written.
#pragma once

#include "common/block_decoder.h"
#include "common/device.cuh"
#include "kernels/sampling.cuh"

namespace kelix::cuda {

inline constexpr int kDecoderThreads = 256;
inline constexpr int kLinearWarps = 8;

// weight [out, in]; bias and position [out] or null; x [batch, in]; added [batch, out] or null, it
// may be y; y [batch, out].
template <class T>
struct LinearArgs {
  const T* weight;
  const T* bias;
  const T* position;
  const float* x;
  const float* added;
  float* y;
  int64_t in, out, batch;
};

// u of the slot: the backbone state, or the embedding of the id drawn last.
template <class T>
__global__ void __launch_bounds__(kDecoderThreads)
    slot_input_kernel(BlockDecoderArgs args, int64_t slot) {
  const int64_t row = blockIdx.x;
  const T* source = static_cast<const T*>(args.hidden) + row * args.input_dim;
  if (slot > 0) {
    const int64_t id = args.ids[row * (args.num_codes + 1) + slot - 1];
    source = static_cast<const T*>(args.table) + (id > 0 ? id : 0) * args.input_dim;
  }
  float* input = args.work.input + row * args.input_dim;
  for (int64_t c = threadIdx.x; c < args.input_dim; c += kDecoderThreads) {
    input[c] = to_float(source[c]);
  }
}

// A warp per output and tile of kRows rows, so that the rows share the loads of the weights. The
// order of a dot product's additions does not depend on the batch. kWide: 16-byte loads.
template <class T, int kRows, bool kWide>
__global__ void __launch_bounds__(kLinearWarps* kWarpSize) linear_kernel(LinearArgs<T> args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kLinearWarps + threadIdx.x / kWarpSize;
  if (output >= args.out) return;  // whole warps
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows;
  const T* weight = args.weight + output * args.in;
  const float* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < args.batch ? first_row + r : args.batch - 1;
    rows[r] = args.x + row * args.in;
  }
  float sums[kRows] = {};
  if constexpr (kWide) {
    constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll 4
    for (int64_t i = lane * kPerLoad; i < args.in; i += kWarpSize * kPerLoad) {
      alignas(16) T w[kPerLoad];
      load_16_bytes(weight + i, w);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int part = 0; part < kPerLoad; part += 4) {
          alignas(16) float v[4];
          load_16_bytes(rows[r] + i + part, v);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[r] += to_float(w[part + e]) * v[e];
        }
      }
    }
  } else {
    for (int64_t i = lane; i < args.in; i += kWarpSize) {
      const float w = to_float(weight[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] += w * rows[r][i];
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = warp_sum(sums[r]);
    if (lane != 0 || first_row + r >= args.batch) continue;
    const int64_t at = (first_row + r) * args.out + output;
    if (args.bias != nullptr) sum += to_float(args.bias[output]);
    if (args.position != nullptr) sum += to_float(args.position[output]);
    if (args.added != nullptr) sum += args.added[at];
    args.y[at] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kDecoderThreads)
    decoder_layer_norm_kernel(const float* x, const T* weight, const T* bias, float* y,
                              int64_t cols) {
  KELIX_SHARED(float, scratch, [kDecoderThreads / kWarpSize]);
  x += blockIdx.x * cols;
  y += blockIdx.x * cols;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) sum += x[c];
  const float mean = cta_sum(sum, scratch) / cols;
  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    square_sum += (x[c] - mean) * (x[c] - mean);
  }
  const float scale = rsqrtf(cta_sum(square_sum, scratch) / cols + kDecoderNormEps);
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    y[c] = (x[c] - mean) * scale * to_float(weight[c]) + to_float(bias[c]);
  }
}

// The norm in front of the head, in place.
template <class T>
__global__ void __launch_bounds__(kDecoderThreads) head_norm_kernel(BlockDecoderArgs args) {
  KELIX_SHARED(float, scratch, [kDecoderThreads / kWarpSize]);
  const int64_t cols = args.input_dim;
  const T* weight = static_cast<const T*>(args.head_norm);
  float* x = args.work.output + blockIdx.x * cols;
  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) square_sum += x[c] * x[c];
  const float scale = rsqrtf(cta_sum(square_sum, scratch) / cols + args.norm_eps);
  for (int64_t c = threadIdx.x; c < cols; c += kDecoderThreads) {
    x[c] = x[c] * scale * to_float(weight[c]);
  }
}

// One warp per (row, head): stores the slot's key and value, then attends to slots 0..slot with an
// online softmax. mixed holds the running sum.
static __global__ void __launch_bounds__(kWarpSize)
    slot_attention_kernel(BlockDecoderArgs args, int64_t layer, int64_t slot) {
  const int64_t row = blockIdx.x, d = args.d_model;
  const int64_t head_dim = d / args.num_heads, start = blockIdx.y * head_dim;
  const float* qkv = args.work.qkv + row * 3 * d + start;
  float* cache = args.work.keys_values +
                 (row * args.num_layers + layer) * (args.num_codes + 1) * 2 * d + start;
  float* out = args.work.mixed + row * d + start;
  const int lane = threadIdx.x;
  // A lane only ever reads the elements that it wrote itself: no barrier is needed.
  for (int64_t c = lane; c < head_dim; c += kWarpSize) {
    cache[slot * 2 * d + c] = qkv[d + c];
    cache[slot * 2 * d + d + c] = qkv[2 * d + c];
    out[c] = 0;
  }
  const float scale = rsqrtf(static_cast<float>(head_dim));
  float top = -INFINITY, total = 0;
  for (int64_t s = 0; s <= slot; ++s) {
    const float* key = cache + s * 2 * d;
    float score = 0;
    for (int64_t c = lane; c < head_dim; c += kWarpSize) score += qkv[c] * key[c];
    score = warp_sum(score) * scale;
    const float raised = fmaxf(score, top);
    const float keep = expf(top - raised), weight = expf(score - raised);
    total = total * keep + weight;
    top = raised;
    for (int64_t c = lane; c < head_dim; c += kWarpSize) {
      out[c] = out[c] * keep + weight * key[d + c];
    }
  }
  for (int64_t c = lane; c < head_dim; c += kWarpSize) out[c] /= total;
}

static __global__ void __launch_bounds__(kDecoderThreads)
    decoder_silu_mul_kernel(BlockDecoderArgs args) {
  const int64_t row = blockIdx.x;
  const float* gate = args.work.gate_up + row * 2 * args.ffn;
  float* out = args.work.activated + row * args.ffn;
  for (int64_t c = threadIdx.x; c < args.ffn; c += kDecoderThreads) {
    out[c] = gate[c] / (1.0f + expf(-gate[c])) * gate[args.ffn + c];
  }
}

// Draws the slot's id, and writes what the rest of the row is unless a later slot says otherwise.
static __global__ void __launch_bounds__(kDrawThreads)
    draw_slot_kernel(BlockDecoderArgs args, int64_t slot) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t row = blockIdx.x, slots = args.num_codes + 1;
  int64_t* ids = args.ids + row * slots;
  float* logprobs = args.logprobs + row * slots;
  // The same for the whole CTA: a text block, or one that failed.
  if (slot > 0 && (ids[0] < args.text_vocab || ids[slot - 1] < 0)) return;
  const HeadSlice slice = head_slice(args, slot);
  float* logits = args.work.logits + row * slice.width;
  if (slot == 0 && args.banned_id >= 0) {
    if (threadIdx.x == 0) logits[args.banned_id] = -INFINITY;
    __syncthreads();
  }
  const float* params = args.params + (row * slots + slot) * 4;
  const DrawRule rule{params[0],       params[1], params[2],   params[3], args.seeds[row],
                      args.steps[row], slot,      slice.first, false};
  float* workspace = args.work.sampling + row * draw_workspace(slice.width);
  const Drawn drawn = draw_row(logits, slice.width, rule, workspace, shared);
  const bool failed = drawn.id < 0;
  for (int64_t j = slot + threadIdx.x; j < slots; j += kDrawThreads) {
    ids[j] = j == slot ? drawn.id : failed ? -1 : args.block_end;
    logprobs[j] = j == slot ? drawn.logprob : failed ? NAN : 0.0f;
  }
}

}  // namespace kelix::cuda
