// What both forms of the in-block loop do in the same words, so that they agree to the last bit:
// the kernel per step (block_decoder.cuh) and the kernel for the whole loop
// (block_decoder_resident.cuh).
#pragma once

#include "common/block_decoder.h"
#include "common/cache.cuh"
#include "kernels/sampling_wide.cuh"

namespace kelix::cuda {

inline constexpr int kDecoderThreads = 256;  // the width of every sum over a row
inline constexpr int kDecoderWarps = kDecoderThreads / kWarpSize;
inline constexpr int kSlotTile = 8;

// weight [out, in]; bias and position [out] or null; x [batch, in]; added [batch, out] or null, it
// may be y; y [batch, out]. scale [out], of int8 weights, or null.
template <class T>
struct LinearArgs {
  const T* weight;
  const T* bias;
  const T* position;
  const float* x;
  const float* added;
  float* y;
  int64_t in, out, batch;
  const float* scale;
};

// Rows of weights and of x must both start on 16 bytes.
template <class T>
__host__ __device__ __forceinline__ bool takes_wide_loads(const LinearArgs<T>& linear) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t step = 16 / static_cast<int64_t>(sizeof(T));
  return linear.in % step == 0 && linear.in % 4 == 0 && aligned(linear.weight) && aligned(linear.x);
}

// What one lane adds to the dot products of kOutputs rows of weights with kRows rows of x; the rows
// share the loads of the weights. The order of the additions depends on `in` and kWide alone.
// kWide: 16-byte loads.
template <class T, int kOutputs, int kRows, bool kWide>
__device__ __forceinline__ void add_products(const T* const (&weights)[kOutputs],
                                             const float* const (&rows)[kRows], int in,
                                             CachePolicy policy, float (&sums)[kOutputs][kRows]) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kWide) {
    constexpr int kPerLoad = 16 / sizeof(T);
    constexpr int kSums = kOutputs * kRows;
    // A load of int8 holds four times the weights of one of float32, and so as many conversions.
    [[maybe_unused]] constexpr int kUnroll =
        sizeof(T) == 1 ? (kSums > 2 ? 1 : 2) : (kSums > 8 ? 2 : 4);
#pragma unroll kUnroll
    for (int i = lane * kPerLoad; i < in; i += kWarpSize * kPerLoad) {
      alignas(16) T w[kOutputs][kPerLoad];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) load_16_bytes(weights[o] + i, policy, w[o]);
#pragma unroll
      for (int part = 0; part < kPerLoad; part += 4) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          alignas(16) float v[4];
          load_16_bytes(rows[r] + i + part, v);
#pragma unroll
          for (int o = 0; o < kOutputs; ++o) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[o][r] += to_float(w[o][part + e]) * v[e];
          }
        }
      }
    }
  } else {
    for (int i = lane; i < in; i += kWarpSize) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const float w = to_float(weights[o][i]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[o][r] += w * rows[r][i];
      }
    }
  }
}

// y = scale x W^T + bias + position + added, one value.
template <class T>
__device__ __forceinline__ void store_output(const LinearArgs<T>& args, int64_t row, int64_t output,
                                             float sum) {
  const int64_t at = row * args.out + output;
  if (args.scale != nullptr) sum *= args.scale[output];
  if (args.bias != nullptr) sum += to_float(args.bias[output]);
  if (args.position != nullptr) sum += to_float(args.position[output]);
  if (args.added != nullptr) sum += args.added[at];
  args.y[at] = sum;
}

__device__ __forceinline__ float silu_mul(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

__device__ __forceinline__ float squared_distance(float x, float mean) {
  return (x - mean) * (x - mean);
}

__device__ __forceinline__ float layer_norm_scale(float squares, int64_t cols) {
  return rsqrtf(squares / cols + kDecoderNormEps);
}

__device__ __forceinline__ float layer_norm_value(float x, float mean, float scale, float weight,
                                                  float bias) {
  return fmaf((x - mean) * scale, weight, bias);
}

__device__ __forceinline__ float head_norm_scale(float squares, int64_t cols, float eps) {
  return rsqrtf(squares / cols + eps);
}

// u of the slot: the backbone state, or the embedding of the id drawn last.
template <class T>
__device__ __forceinline__ const T* slot_input(const BlockDecoderArgs& args, int64_t row,
                                               int64_t slot, int64_t last_id) {
  if (slot == 0) return static_cast<const T*>(args.hidden) + row * args.input_dim;
  return static_cast<const T*>(args.table) + (last_id > 0 ? last_id : 0) * args.input_dim;
}

// The keys and values of a row's earlier slots in one layer: [num_codes + 1, 2d].
__device__ __forceinline__ float* slot_cache(const BlockDecoderArgs& args, int64_t row,
                                             int64_t layer) {
  return args.work.keys_values +
         (row * args.num_layers + layer) * (args.num_codes + 1) * 2 * args.d_model;
}

// One warp attends with one head: the query, key and value of `slot` in qkv, what came before in
// cache; all pointers at the head's first element. A tile of slots at a time, so that its loads are
// in flight together, with an online softmax over the tiles. out holds the running sum.
__device__ KELIX_NOINLINE static void attend(const float* qkv, const float* cache, int64_t d,
                                             int64_t head_dim, int64_t slot, float* out) {
  const int lane = threadIdx.x % kWarpSize;
  const float scale = rsqrtf(static_cast<float>(head_dim));
  const auto key_of = [&](int64_t s) { return s == slot ? qkv + d : cache + s * 2 * d; };
  float top = -INFINITY, total = 0;
  for (int64_t first = 0; first <= slot; first += kSlotTile) {
    float weights[kSlotTile] = {};
    for (int64_t c = lane; c < head_dim; c += kWarpSize) {
#pragma unroll
      for (int t = 0; t < kSlotTile; ++t) {
        if (first + t <= slot) weights[t] += qkv[c] * key_of(first + t)[c];
      }
    }
    float raised = top;
#pragma unroll
    for (int t = 0; t < kSlotTile; ++t) {
      weights[t] = first + t <= slot ? warp_sum(weights[t]) * scale : -INFINITY;
      raised = fmaxf(raised, weights[t]);
    }
    const float keep = expf(top - raised);
    top = raised;
    total *= keep;
#pragma unroll
    for (int t = 0; t < kSlotTile; ++t) {
      weights[t] = expf(weights[t] - raised);
      total += weights[t];
    }
    for (int64_t c = lane; c < head_dim; c += kWarpSize) {
      float sum = first == 0 ? 0.0f : out[c] * keep;
#pragma unroll
      for (int t = 0; t < kSlotTile; ++t) {
        // A value lies d behind its key.
        if (first + t <= slot) sum = fmaf(weights[t], key_of(first + t)[d + c], sum);
      }
      out[c] = sum;
    }
  }
  for (int64_t c = lane; c < head_dim; c += kWarpSize) out[c] /= total;
}

// The slot's key and value of one head, for the slots to come.
__device__ __forceinline__ void store_key_value(const float* qkv, float* cache, int64_t d,
                                                int64_t head_dim, int64_t slot) {
  for (int64_t c = threadIdx.x % kWarpSize; c < head_dim; c += kWarpSize) {
    cache[slot * 2 * d + c] = qkv[d + c];
    cache[slot * 2 * d + d + c] = qkv[2 * d + c];
  }
}

__device__ __forceinline__ DrawRule rule_of_slot(const BlockDecoderArgs& args, int64_t row,
                                                 int64_t slot) {
  const float* params = args.params + (row * (args.num_codes + 1) + slot) * 4;
  return {params[0],
          params[1],
          params[2],
          params[3],
          args.seeds[row],
          args.steps[row],
          slot,
          head_slice(args, slot).first,
          false};
}

__device__ __forceinline__ float* slot_logits(const BlockDecoderArgs& args, int64_t row,
                                              int64_t slot) {
  return args.work.logits + row * head_slice(args, slot).width;
}

__device__ __forceinline__ WideRow<float> wide_slot_row(const BlockDecoderArgs& args, int64_t row,
                                                        int64_t slot) {
  const int64_t width = head_slice(args, slot).width;
  return wide_row<float>(slot_logits(args, row, slot), width,
                         args.work.sampling + row * draw_workspace(width));
}

// The calling CTA, and after it whoever it tells, sees the banned id as impossible.
__device__ __forceinline__ void mask_banned_id(const BlockDecoderArgs& args, int64_t row,
                                               int64_t slot) {
  if (slot > 0 || args.banned_id < 0) return;
  if (threadIdx.x == 0) slot_logits(args, row, slot)[args.banned_id] = -INFINITY;
  __syncthreads();
}

// Writes the slot's id, and what the rest of the row is unless a later slot says otherwise.
__device__ __forceinline__ void store_slot(const BlockDecoderArgs& args, int64_t row, int64_t slot,
                                           const Drawn& drawn) {
  const int64_t slots = args.num_codes + 1;
  const bool failed = drawn.id < 0;
  for (int64_t j = slot + threadIdx.x; j < slots; j += kDrawThreads) {
    args.ids[row * slots + j] = j == slot ? drawn.id : failed ? -1 : args.block_end;
    args.logprobs[row * slots + j] = j == slot ? drawn.logprob : failed ? NAN : 0.0f;
  }
}

// After a slot's draw: a text block, or one that failed, has nothing more to draw.
__device__ __forceinline__ bool is_done(const BlockDecoderArgs& args, int64_t slot, int64_t id) {
  return id < (slot == 0 ? args.text_vocab : 0);
}

}  // namespace kelix::cuda
