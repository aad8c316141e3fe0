// How a call of paged_attention spreads over CTAs. Decided from shapes alone: the lengths live on
// the device, and a call that never asks for them can be captured in a CUDA graph.
#pragma once

#include <algorithm>

#include "common/attention.h"
#include "common/ceil_div.h"
#include "common/host_device.h"

namespace kelix::cuda {

inline constexpr int kKeyTile = 64;            // keys of a pipeline stage
inline constexpr int kMaxTileDim = 128;        // largest head_dim on tensor cores
inline constexpr int kMiddleTileDim = 80;      // the size between 64 and it that rows are padded to
inline constexpr int kLaneHeads = 4;           // query heads of a CTA without them
inline constexpr int kTileHeads = 16;          // and with them: the rows of an mma
inline constexpr int kPrefillQueries = 128;    // query rows x heads of a CTA of the prefill form
inline constexpr int64_t kMinSplitKeys = 128;  // fewer would not pay for the merge
inline constexpr int64_t kMaxSplits = 64;
// Four rounds of two CTAs per multiprocessor of an H100: the last round's gaps stay small.
inline constexpr int64_t kWantedCtas = 4 * 2 * 132;

// Keys per CTA of a row that sees `visible` keys. A short context uses fewer splits than planned.
KELIX_HOST_DEVICE constexpr int64_t keys_per_split(int64_t visible, int64_t splits) {
  const int64_t keys = ceil_div(ceil_div(visible, splits), kKeyTile) * kKeyTile;
  return keys < kMinSplitKeys ? kMinSplitKeys : keys;
}

// CTAs per KV head that share a unit's query heads.
inline int64_t head_tiles(const PagedAttentionArgs& args) {
  return ceil_div(args.num_heads / args.num_kv_heads, args.plan.tiles ? kTileHeads : kLaneHeads);
}

// Bytes of a copy of float8 rows padded to kDim: a head_dim of 72 leaves rows aligned to 8 bytes.
template <int kDim>
inline constexpr int kFloat8CopyBytes = kDim == kMiddleTileDim ? 8 : 16;

inline bool loads_vectors(const PagedAttentionArgs& args) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool rows = args.float8_cache ? args.head_dim % 8 == 0
                                      : args.head_dim * element_size(args.dtype) % 16 == 0;
  return rows && aligned(args.q) && aligned(args.k_cache) && aligned(args.v_cache);
}

// Whether the rows of a float8 cache can be copied as the tensor-core forms do it.
inline bool copies_float8_rows(int64_t head_dim) {
  return head_dim % 16 == 0 || (head_dim > 64 && head_dim <= kMiddleTileDim);
}

inline AttentionPlan attention_plan(PagedAttentionArgs args) {
  AttentionPlan& plan = args.plan;
  plan.wide = loads_vectors(args);
  plan.tiles = plan.wide && args.dtype != DType::kFloat32 && args.head_dim <= kMaxTileDim &&
               (!args.float8_cache || copies_float8_rows(args.head_dim));
  // More rows than requests: some have several, and tiles of queries take those. Without tensor
  // cores every row goes alone.
  plan.unit_is_request = plan.tiles && args.num_rows > args.batch;
  plan.units = plan.unit_is_request ? args.batch : args.num_rows;
  if (plan.unit_is_request && args.batch == 1) plan.units = 0;
  const int64_t ctas = plan.units * args.num_kv_heads * head_tiles(args);
  const int64_t most = std::min(kMaxSplits, args.max_pages * args.page_size / kMinSplitKeys);
  plan.splits = std::clamp<int64_t>(ceil_div(kWantedCtas, std::max<int64_t>(1, ctas)), 1,
                                    std::max<int64_t>(1, most));
  return plan;
}

// Floats of a weighted sum of values, its largest score and its sum of weights.
inline int64_t partial_floats(const PagedAttentionArgs& args) {
  if (args.plan.splits == 1) return 0;
  return args.plan.splits * args.plan.units * args.num_heads * (args.head_dim + 2);
}

}  // namespace kelix::cuda
