// The prefill form: a CTA per (tile of 128 queries of a request, KV head). Takes the requests with
// several rows; those with one row are left to the decode form where that runs too.
#pragma once

#include "kernels/attention_tile.cuh"

namespace kelix::cuda {

inline constexpr int kPrefillStages = 2;
// Eight warps to a stage: with four, the second-level cache would have to deliver twice as much.
inline constexpr int kPrefillThreads = kPrefillQueries / kTileHeads * kWarpSize;

template <class Cache, int kDim>
using PrefillStream = KeyStream<Cache, kDim, kPrefillStages, kPrefillThreads>;

template <class T, class Cache, int kDim>
inline constexpr int kPrefillShared = StageRows<T, PrefillStream<Cache, kDim>>::kShared;

// The number of a request's first tile when each request has one tile more than it may need: the
// host knows the number of all tiles without knowing the lengths.
__device__ __forceinline__ int64_t first_tile(const PagedAttentionArgs& args, int64_t request) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  return args.query_start[request] * group / kPrefillQueries + request;
}

inline int64_t prefill_tiles(const PagedAttentionArgs& args) {
  return args.num_rows * (args.num_heads / args.num_kv_heads) / kPrefillQueries + args.batch;
}

__device__ __forceinline__ int64_t request_of_tile(const PagedAttentionArgs& args, int64_t index) {
  int64_t low = 0;
  int64_t high = args.batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_tile(args, middle) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One CTA per multiprocessor is promised: for two the compiler would spill.
template <class T, class Cache, int kDim>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    paged_attention_prefill_kernel(PagedAttentionArgs args) {
  using Stream = PrefillStream<Cache, kDim>;
  using Rows = StageRows<T, Stream>;
  KELIX_DYNAMIC_SHARED(Cache, shared);
  KELIX_SHARED(int64_t, offsets, [kPrefillStages][kKeyTile]);

  // The last tiles see the most keys: they go first.
  const int64_t index = gridDim.x - 1 - blockIdx.x;
  const int64_t request = request_of_tile(args, index);
  const int64_t start = args.query_start[request];
  const int64_t num_rows = args.query_start[request + 1] - start;
  const int group = static_cast<int>(args.num_heads / args.num_kv_heads);
  const int64_t all = num_rows * group;
  const int64_t begin = (index - first_tile(args, request)) * kPrefillQueries;
  const bool decoded = args.plan.units > 0 && num_rows == 1;
  if (begin < 0 || begin >= all || decoded) return;
  const QueryTile tile{start,
                       blockIdx.y,
                       group,
                       static_cast<int>(begin),
                       static_cast<int>(min(begin + kPrefillQueries, all)),
                       static_cast<int>(args.context_lens[request] - num_rows + 1)};
  const KeyRange range{0, max(tile.visible(tile.end - 1), 0)};

  Stream stream(args, request, tile.kv_head, range, shared, offsets);
  Rows rows(stream, shared);
  stream.start();
  const int first = tile.begin + static_cast<int>(threadIdx.x) / kWarpSize * kTileHeads;
  QueryWarp<T, kDim, kKeyTile> queries(args, tile, first);
  for (int step = 0; step < stream.steps(); ++step) {
    stream.advance(step);
    const int page = stream.page_of(step + kPrefillStages);
    if constexpr (Rows::kWidens) {
      rows.template make<kKeyTile, kPrefillThreads>(step, 0, threadIdx.x);
      __syncthreads();
    }
    queries.attend(rows.keys(step), rows.values(step), Rows::kStride, step * kKeyTile);
    stream.place(step + kPrefillStages, page);
  }
  queries.finish();

#pragma unroll
  for (int i = 0; i < queries.kRows; ++i) {
    const int query = first + queries.row() + i * queries.kRowStep;
    if (query >= tile.end) continue;
    const float inverse = inverse_or_zero(queries.norm(i));
    T* out = static_cast<T*>(args.out) + tile.offset(args, query);
#pragma unroll
    for (int part = 0; part < kDim / 8; ++part) {
      const int d = part * 8 + queries.column();
      if (d >= args.head_dim) continue;
      store_4_bytes(out + d,
                    pack<T>(queries.sum(part, i, 0) * inverse, queries.sum(part, i, 1) * inverse));
    }
  }
}

}  // namespace kelix::cuda
