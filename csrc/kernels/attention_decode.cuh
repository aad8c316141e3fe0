// The decode form: a CTA per (unit, up to 16 query heads of a KV head, split of the context).
#pragma once

#include "kernels/attention_tile.cuh"

namespace kelix::cuda {

// Stages under way; two where three do not fit the 99 KB of shared memory that a CTA has on the
// smaller chips of a generation.
inline constexpr int kDecodeStages = 3;
inline constexpr int kFewDecodeStages = 2;
inline constexpr int kLittleShared = 99 << 10;
inline constexpr int kDecodeStaticShared = 2 << 10;

template <class Cache, int kDim, int kStages>
using DecodeStream = KeyStream<Cache, kDim, kStages, kAttentionThreads>;

template <class T, class Cache, int kDim, int kStages>
inline constexpr int kDecodeShared = StageRows<T, DecodeStream<Cache, kDim, kStages>>::kShared;

template <class T, class Cache, int kDim, int kStages>
__global__ void __launch_bounds__(kAttentionThreads)
    paged_attention_decode_kernel(PagedAttentionArgs args) {
  constexpr int kWarpKeys = kKeyTile / kAttentionWarps;
  using Stream = DecodeStream<Cache, kDim, kStages>;
  using Rows = StageRows<T, Stream>;
  KELIX_DYNAMIC_SHARED(Cache, shared);
  KELIX_SHARED(int64_t, offsets, [kStages][kKeyTile]);

  const Unit unit = unit_of(args, blockIdx.x);
  if (!unit.present) return;
  const KeyRange range = split_range(args, unit.visible, blockIdx.z);
  // The merge knows which splits are empty; only a row that is not split has to be cleared.
  if (range.begin >= range.end && args.plan.splits > 1) return;
  const int group = static_cast<int>(args.num_heads / args.num_kv_heads);
  const int tiles = (group + kTileHeads - 1) / kTileHeads;
  const int begin = static_cast<int>(blockIdx.y % tiles) * kTileHeads;
  const QueryTile tile{
      unit.row, blockIdx.y / tiles, group, begin, min(begin + kTileHeads, group), unit.visible};

  Stream stream(args, unit.request, tile.kv_head, range, shared, offsets);
  Rows rows(stream, shared);
  stream.start();
  QueryWarp<T, kDim, kWarpKeys> queries(args, tile, begin);
  const int warp = threadIdx.x / kWarpSize;
  const int own = warp * kWarpKeys;  // this warp's keys of a stage
  for (int step = 0; step < stream.steps(); ++step) {
    stream.advance(step);
    const int page = stream.page_of(step + kStages);
    if constexpr (Rows::kWidens) {
      // Its own rows alone: the others of its warp are all that it has to wait for.
      rows.template make<kWarpKeys, kWarpSize>(step, own, threadIdx.x % kWarpSize);
      __syncwarp();
    }
    queries.attend(rows.keys(step) + own * Rows::kStride, rows.values(step) + own * Rows::kStride,
                   Rows::kStride, static_cast<int>(range.begin) + step * kKeyTile + own);
    stream.place(step + kStages, page);
  }
  queries.finish();

  KELIX_SHARED(float, warp_max, [kAttentionWarps][kTileHeads]);
  KELIX_SHARED(float, warp_norm, [kAttentionWarps][kTileHeads]);
  static_assert(kAttentionWarps * kTileHeads * kDim * sizeof(float) <= Rows::kShared);
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();  // the stages are read, and no copy is under way: the sums may lie there
#pragma unroll
  for (int i = 0; i < queries.kRows; ++i) {
    const int query = queries.row() + i * queries.kRowStep;
    if (queries.column() == 0) {
      warp_max[warp][query] = queries.max(i);
      warp_norm[warp][query] = queries.norm(i);
    }
    float* sum = sums + (warp * kTileHeads + query) * kDim + queries.column();
#pragma unroll
    for (int part = 0; part < kDim / 8; ++part) {
      sum[part * 8] = queries.sum(part, i, 0);
      sum[part * 8 + 1] = queries.sum(part, i, 1);
    }
  }
  __syncthreads();
  store_joined<T>(args, unit, tile.kv_head * group + begin, tile.end - begin,
                  {&warp_max[0][0], &warp_norm[0][0], sums, kTileHeads, kDim});
}

}  // namespace kelix::cuda
