// What the forms of paged attention share. A call takes one or two of them (attention_plan.h):
//
//   attention_tile.cuh   bf16 and fp16 on tensor cores: `decode`, a CTA per (unit, KV head, split
//                        of the context), and `prefill`, a CTA per (tile of query rows, KV head)
//   attention_lanes.cuh  everything else: float32, large or odd head_dim
//   attention_merge.cuh  joins the splits
//
// Scores are kept times log2(e), so that weights are powers of two.
#pragma once

#include "common/attention.h"
#include "common/device.cuh"
#include "kernels/attention_plan.h"

namespace kelix::cuda {

inline constexpr int kAttentionWarps = 4;
inline constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
inline constexpr float kLog2E = 1.4426950408889634f;

// The request that owns a query row: the last one that starts at or before it.
__device__ __forceinline__ int64_t request_of_row(const PagedAttentionArgs& args, int64_t row) {
  // While all requests are decoding, row and request are the same number.
  if (row < args.batch && args.query_start[row] <= row && row < args.query_start[row + 1]) {
    return row;
  }
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

// A query row with CTAs of its own.
struct Unit {
  bool present;
  int64_t request;
  int64_t row;
  int visible;  // keys that it sees; none if not positive
};

__device__ __forceinline__ Unit unit_of(const PagedAttentionArgs& args, int64_t index) {
  const bool is_request = args.plan.unit_is_request;
  const int64_t request = is_request ? index : request_of_row(args, index);
  const int64_t start = args.query_start[request];
  const int64_t num_rows = args.query_start[request + 1] - start;
  const int64_t row = is_request ? start : index;
  // Rows outside every request have no CTA, nor do requests of several rows that the prefill takes.
  const bool present = is_request ? num_rows == 1 : row >= start && row < start + num_rows;
  const int64_t visible = args.context_lens[request] - num_rows + row - start + 1;
  return {present, request, row, static_cast<int>(visible)};
}

// The keys of one split.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ KeyRange split_range(const PagedAttentionArgs& args, int64_t visible,
                                                int64_t split) {
  if (visible <= 0) return {0, 0};
  const int64_t keys = keys_per_split(visible, args.plan.splits);
  return {min(split * keys, visible), min((split + 1) * keys, visible)};
}

// Element of the cache where the token's key (and value) begins.
__device__ __forceinline__ int64_t cache_offset(const PagedAttentionArgs& args, int64_t page,
                                                int64_t kv_head, int64_t token) {
  return ((page * args.num_kv_heads + kv_head) * args.page_size + token % args.page_size) *
         args.head_dim;
}

// A split's share of one query: sum[d] = sum of weight * value, with weight 2^(score - max), and
// the sum of the weights.
struct Partial {
  float* sum;
  float* max_norm;
};

__device__ __forceinline__ Partial partial_of(const PagedAttentionArgs& args, int64_t split,
                                              int64_t unit, int64_t head) {
  const int64_t queries = args.plan.splits * args.plan.units * args.num_heads;
  const int64_t query = (split * args.plan.units + unit) * args.num_heads + head;
  return {args.partials + query * args.head_dim,
          args.partials + queries * args.head_dim + query * 2};
}

// Weight of a share whose largest score is `max`; a share without keys has none.
__device__ __forceinline__ float share_weight(float max, float total_max) {
  return max == -INFINITY ? 0.0f : exp2f(max - total_max);
}

__device__ __forceinline__ float inverse_or_zero(float norm) {
  return norm > 0 ? 1.0f / norm : 0.0f;
}

// Results of a CTA's warps, each over keys of its own, in shared memory.
struct WarpShares {
  const float* max;   // [kAttentionWarps][queries]
  const float* norm;  // [kAttentionWarps][queries]
  const float* sum;   // [kAttentionWarps][queries][dims]
  int queries;
  int dims;
};

// Joins the warps' shares of query heads first_head .. first_head + heads of a unit, and stores
// them: the output itself when the context is not split, else a partial result.
template <class T>
__device__ __forceinline__ void store_joined(const PagedAttentionArgs& args, const Unit& unit,
                                             int64_t first_head, int heads,
                                             const WarpShares& shares) {
  const int lane = threadIdx.x % kWarpSize;
  for (int h = threadIdx.x / kWarpSize; h < heads; h += kAttentionWarps) {
    float max = -INFINITY;
    for (int w = 0; w < kAttentionWarps; ++w) max = fmaxf(max, shares.max[w * shares.queries + h]);
    float norm = 0;
    float weight[kAttentionWarps];
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      weight[w] = share_weight(shares.max[w * shares.queries + h], max);
      norm += weight[w] * shares.norm[w * shares.queries + h];
    }
    const int64_t head = first_head + h;
    const bool split = args.plan.splits > 1;
    const Partial partial = partial_of(args, blockIdx.z, blockIdx.x, head);
    T* out = static_cast<T*>(args.out) + (unit.row * args.num_heads + head) * args.head_dim;
    const float inverse = inverse_or_zero(norm);
    for (int d = lane; d < args.head_dim; d += kWarpSize) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        sum += weight[w] * shares.sum[(w * shares.queries + h) * shares.dims + d];
      }
      if (split) {
        partial.sum[d] = sum;
      } else {
        out[d] = from_float<T>(sum * inverse);
      }
    }
    if (split && lane == 0) {
      partial.max_norm[0] = max;
      partial.max_norm[1] = norm;
    }
  }
}

}  // namespace kelix::cuda
