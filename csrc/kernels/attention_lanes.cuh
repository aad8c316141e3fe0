// Paged attention without tensor cores, for any dtype and head_dim: a CTA per (query row, up to
// four query heads of a KV head, split of the context). A key lies across `width` lanes of a warp,
// so that a warp works on 32 / width keys at a time, and each of those slots runs an online softmax
// of its own. They are joined at the end: slots by shuffles, warps in shared memory.
#pragma once

#include "common/float8.cuh"
#include "common/vector.cuh"
#include "kernels/attention.cuh"

namespace kelix::cuda {

// A lane's share of a row of head_dim elements: kChunks pieces of kVector.
template <int kVector, int kChunks>
struct LaneShare {
  static constexpr int kSize = kVector * kChunks;
  int width;  // lanes of a row, a power of two
  int lane;   // among them
  int head_dim;

  __device__ LaneShare(int64_t dims) : width(1), lane(0), head_dim(static_cast<int>(dims)) {
    while (width < kWarpSize && width * kVector < head_dim) width *= 2;
    lane = static_cast<int>(threadIdx.x) % width;
  }
  __device__ int first(int chunk) const { return (chunk * width + lane) * kVector; }

  // Elements past head_dim, and all of an absent row, are zero.
  template <class T>
  __device__ void load(const T* row, bool present, float (&to)[kSize]) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float part[kVector] = {};
      if (present && first(chunk) < head_dim) load_floats(row + first(chunk), part);
#pragma unroll
      for (int i = 0; i < kVector; ++i) to[chunk * kVector + i] = part[i];
    }
  }
};

// Running softmax of one query: largest score, sum of weights, weighted sum of values.
template <int kSize>
struct SoftmaxState {
  float max = -INFINITY;
  float norm = 0;
  float sum[kSize] = {};

  // Takes in a share with weights 2^(score - other_max).
  __device__ __forceinline__ void add(float other_max, float other_norm,
                                      const float (&other_sum)[kSize]) {
    const float larger = fmaxf(max, other_max);
    const float keep = share_weight(max, larger);
    const float take = share_weight(other_max, larger);
    max = larger;
    norm = norm * keep + other_norm * take;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = sum[i] * keep + other_sum[i] * take;
  }
};

// Sum over the `width` lanes of a row, in each of them.
__device__ __forceinline__ float row_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

template <class T, class Cache, int kVector, int kChunks>
__global__ void __launch_bounds__(kAttentionThreads)
    paged_attention_lanes_kernel(PagedAttentionArgs args) {
  const int warp = threadIdx.x / kWarpSize;
  const int group = static_cast<int>(args.num_heads / args.num_kv_heads);
  const int tiles = (group + kLaneHeads - 1) / kLaneHeads;
  const int64_t kv_head = blockIdx.y / tiles;
  const int head_in_group = static_cast<int>(blockIdx.y % tiles) * kLaneHeads;
  const int heads = min(kLaneHeads, group - head_in_group);
  const int64_t first_head = kv_head * group + head_in_group;
  const Unit unit = unit_of(args, blockIdx.x);
  if (!unit.present) return;
  const KeyRange range = split_range(args, unit.visible, blockIdx.z);
  // The merge knows which splits are empty; only a row that is not split has to be cleared.
  if (range.begin >= range.end && args.plan.splits > 1) return;

  using Share = LaneShare<kVector, kChunks>;
  constexpr int kKeysInFlight = Share::kSize > 4 ? 1 : 2;  // of a slot: as registers allow
  const Share share(args.head_dim);
  float q[kLaneHeads][Share::kSize];
  SoftmaxState<Share::kSize> state[kLaneHeads];
#pragma unroll
  for (int h = 0; h < kLaneHeads; ++h) {
    const int64_t head = first_head + min(h, heads - 1);
    share.load(static_cast<const T*>(args.q) + (unit.row * args.num_heads + head) * args.head_dim,
               true, q[h]);
#pragma unroll
    for (float& v : q[h]) v *= args.scale * kLog2E;
  }

  const int32_t* pages = args.page_table + unit.request * args.max_pages;
  const int slots = kWarpSize / share.width;
  const int slot = static_cast<int>(threadIdx.x) % kWarpSize / share.width;
  const int64_t step = kAttentionWarps * slots;
  // All lanes of a warp take every turn: the scores are summed across them.
  for (int64_t first = range.begin + warp * slots; first < range.end;
       first += step * kKeysInFlight) {
    float k[kKeysInFlight][Share::kSize];
    float v[kKeysInFlight][Share::kSize];
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) {
      const int64_t token = first + i * step + slot;
      const bool present = token < range.end;
      const int64_t page = present ? pages[token / args.page_size] : 0;
      const int64_t at = cache_offset(args, page, kv_head, token);
      share.load(static_cast<const Cache*>(args.k_cache) + at, present, k[i]);
      share.load(static_cast<const Cache*>(args.v_cache) + at, present, v[i]);
    }
#pragma unroll
    for (int i = 0; i < kKeysInFlight; ++i) {
      const bool present = first + i * step + slot < range.end;
#pragma unroll
      for (int h = 0; h < kLaneHeads; ++h) {
        float partial = 0;
#pragma unroll
        for (int d = 0; d < Share::kSize; ++d) partial += q[h][d] * k[i][d];
        const float score = row_sum(partial, share.width);
        state[h].add(present ? score : -INFINITY, 1.0f, v[i]);
      }
    }
  }

  KELIX_SHARED(float, warp_max, [kAttentionWarps][kLaneHeads]);
  KELIX_SHARED(float, warp_norm, [kAttentionWarps][kLaneHeads]);
  constexpr int kDims = Share::kSize * kWarpSize;
  KELIX_SHARED(float, warp_sum, [kAttentionWarps][kLaneHeads][kDims]);
#pragma unroll
  for (int h = 0; h < kLaneHeads; ++h) {
    for (int offset = share.width; offset < kWarpSize; offset *= 2) {
      float other[Share::kSize];
#pragma unroll
      for (int d = 0; d < Share::kSize; ++d) other[d] = shuffle_xor(state[h].sum[d], offset);
      const float other_max = shuffle_xor(state[h].max, offset);
      const float other_norm = shuffle_xor(state[h].norm, offset);
      state[h].add(other_max, other_norm, other);
    }
    if (slot != 0) continue;
    if (share.lane == 0) {
      warp_max[warp][h] = state[h].max;
      warp_norm[warp][h] = state[h].norm;
    }
#pragma unroll
    for (int d = 0; d < Share::kSize; ++d) {
      warp_sum[warp][h][share.first(d / kVector) + d % kVector] = state[h].sum[d];
    }
  }
  __syncthreads();
  store_joined<T>(args, unit, first_head, heads,
                  {&warp_max[0][0], &warp_norm[0][0], &warp_sum[0][0][0], kLaneHeads, kDims});
}

}  // namespace kelix::cuda
