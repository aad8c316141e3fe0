// RoPE with the cache write, and attention over pages.
//
// rope_store_kv: one warp per (token, head). paged_attention: one CTA per (query row, up to four
// query heads of one KV head). Each warp walks every kAttentionWarps-th key with its own online
// softmax, lanes across head_dim; the warps' partial results are merged in shared memory at the
// end.
#pragma once

#include "common/attention.h"
#include "common/device.cuh"

namespace kelix::cuda {

inline constexpr int kRopeThreads = 128;
inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
inline constexpr int kHeadTile = 4;  // query heads that share one load of a key

template <class T>
__global__ void __launch_bounds__(kRopeThreads) rope_store_kv_kernel(RopeStoreKvArgs args) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t all_heads = args.num_heads + 2 * args.num_kv_heads;
  const int64_t unit =
      static_cast<int64_t>(blockIdx.x) * (kRopeThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (unit >= args.num_tokens * all_heads) return;
  const int64_t token = unit / all_heads;
  const int64_t head = unit % all_heads;
  const int64_t head_dim = args.head_dim;
  const int64_t half = head_dim / 2;
  const T* x = static_cast<const T*>(args.qkv) + unit * head_dim;

  const bool is_query = head < args.num_heads;
  const bool is_value = head >= args.num_heads + args.num_kv_heads;
  T* out;
  if (is_query) {
    out = static_cast<T*>(args.q) + (token * args.num_heads + head) * head_dim;
  } else {
    const int64_t slot = args.slots[token];
    if (slot < 0) return;
    const int64_t kv_head = (head - args.num_heads) % args.num_kv_heads;
    const int64_t row = (slot / args.page_size * args.num_kv_heads + kv_head) * args.page_size +
                        slot % args.page_size;
    out = static_cast<T*>(is_value ? args.v_cache : args.k_cache) + row * head_dim;
  }
  if (is_value) {
    for (int64_t i = lane; i < head_dim; i += kWarpSize) out[i] = x[i];
    return;
  }

  const T* weight = static_cast<const T*>(is_query ? args.q_weight : args.k_weight);
  float scale = 1.0f;
  if (weight != nullptr) {
    float square_sum = 0;
    for (int64_t i = lane; i < head_dim; i += kWarpSize) {
      square_sum += to_float(x[i]) * to_float(x[i]);
    }
    scale = rsqrtf(warp_sum(square_sum) / head_dim + args.eps);
  }
  const auto normed = [&](int64_t i) {
    const float v = to_float(x[i]);
    return weight == nullptr ? v : round_to<T>(round_to<T>(v * scale) * to_float(weight[i]));
  };
  const float* cos = args.cos_sin + args.positions[token] * head_dim;
  const float* sin = cos + half;
  for (int64_t i = lane; i < half; i += kWarpSize) {
    const float first = normed(i);
    const float second = normed(half + i);
    out[i] = from_float<T>(first * cos[i] - second * sin[i]);
    out[half + i] = from_float<T>(second * cos[i] + first * sin[i]);
  }
}

// The request that owns a query row: the last one that starts at or before it.
__device__ __forceinline__ int64_t request_of_row(const PagedAttentionArgs& args, int64_t row) {
  int64_t low = 0;
  int64_t high = args.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (args.query_start[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Running softmax of one query: maximum, sum of weights, weighted sum of values (a lane's share).
template <int kPerLane>
struct SoftmaxState {
  float max = -INFINITY;
  float norm = 0;
  float sum[kPerLane] = {};
};

// kPerLane: elements of head_dim per lane, ceil(head_dim / 32).
template <class T, int kPerLane>
__global__ void __launch_bounds__(kAttentionThreads)
    paged_attention_kernel(PagedAttentionArgs args) {
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t row = blockIdx.x;
  const int group = static_cast<int>(args.num_heads / args.num_kv_heads);
  const int tiles = (group + kHeadTile - 1) / kHeadTile;
  const int64_t kv_head = blockIdx.y / tiles;
  const int head_in_group = static_cast<int>(blockIdx.y % tiles) * kHeadTile;
  const int heads = min(kHeadTile, group - head_in_group);
  const int64_t first_head = kv_head * group + head_in_group;
  const int64_t head_dim = args.head_dim;

  const int64_t request = request_of_row(args, row);
  const int64_t start = args.query_start[request];
  const int64_t num_rows = args.query_start[request + 1] - start;
  if (row < start || row >= start + num_rows) return;  // rows outside every request
  const int64_t context = args.context_lens[request];
  const int64_t visible = context == 0 ? 0 : context - num_rows + (row - start) + 1;

  float q[kHeadTile][kPerLane];
  SoftmaxState<kPerLane> state[kHeadTile];
#pragma unroll
  for (int h = 0; h < kHeadTile; ++h) {
    const T* source = static_cast<const T*>(args.q) +
                      (row * args.num_heads + first_head + min(h, heads - 1)) * head_dim;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      q[h][i] = d < head_dim ? to_float(source[d]) * args.scale : 0.0f;
    }
  }

  const int32_t* pages = args.page_table + request * args.max_pages;
  for (int64_t token = warp; token < visible; token += kAttentionWarps) {
    const int64_t page = pages[token / args.page_size];
    const int64_t at =
        ((page * args.num_kv_heads + kv_head) * args.page_size + token % args.page_size) * head_dim;
    const T* key = static_cast<const T*>(args.k_cache) + at;
    const T* value = static_cast<const T*>(args.v_cache) + at;
    float k[kPerLane];
    float v[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + i * kWarpSize;
      k[i] = d < head_dim ? to_float(key[d]) : 0.0f;
      v[i] = d < head_dim ? to_float(value[d]) : 0.0f;
    }
#pragma unroll
    for (int h = 0; h < kHeadTile; ++h) {
      float partial = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) partial += q[h][i] * k[i];
      const float score = warp_sum(partial);
      const float max = fmaxf(state[h].max, score);
      const float shrink = expf(state[h].max - max);
      const float weight = expf(score - max);
      state[h].max = max;
      state[h].norm = state[h].norm * shrink + weight;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        state[h].sum[i] = state[h].sum[i] * shrink + weight * v[i];
      }
    }
  }

  KELIX_SHARED(float, warp_max, [kAttentionWarps][kHeadTile]);
  KELIX_SHARED(float, warp_norm, [kAttentionWarps][kHeadTile]);
  KELIX_SHARED(float, warp_values, [kAttentionWarps][kHeadTile][kPerLane * kWarpSize]);
#pragma unroll
  for (int h = 0; h < kHeadTile; ++h) {
    if (lane == 0) {
      warp_max[warp][h] = state[h].max;
      warp_norm[warp][h] = state[h].norm;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      warp_values[warp][h][lane + i * kWarpSize] = state[h].sum[i];
    }
  }
  __syncthreads();

  for (int h = warp; h < heads; h += kAttentionWarps) {
    float max = -INFINITY;
    for (int w = 0; w < kAttentionWarps; ++w) max = fmaxf(max, warp_max[w][h]);
    float norm = 0;
    float weight[kAttentionWarps];
    for (int w = 0; w < kAttentionWarps; ++w) {
      // A warp that saw no key has max -inf; so does every warp when nothing is visible.
      weight[w] = warp_max[w][h] == -INFINITY ? 0.0f : expf(warp_max[w][h] - max);
      norm += weight[w] * warp_norm[w][h];
    }
    const float inverse = norm > 0 ? 1.0f / norm : 0.0f;
    T* out = static_cast<T*>(args.out) + (row * args.num_heads + first_head + h) * head_dim;
    for (int64_t d = lane; d < head_dim; d += kWarpSize) {
      float sum = 0;
      for (int w = 0; w < kAttentionWarps; ++w) sum += weight[w] * warp_values[w][h][d];
      out[d] = from_float<T>(sum * inverse);
    }
  }
}

}  // namespace kelix::cuda
