// CPU kernels of the attention stem.
#pragma once

#include "common/attention.h"
#include "common/isa.h"

namespace kelix {

// Queries that share one pass over a KV head: enough to reuse the keys of a prefill chunk from the
// cache, few enough to keep their accumulators there too.
inline constexpr int64_t kQueryTile = 32;
inline constexpr int64_t kMaxHeadDim = 256;

// Queries `begin..end` of one request and one KV head. A request's queries are numbered
// row * group + head within the group, so that the heads of a group are neighbours.
struct AttentionTile {
  int64_t request;
  int64_t kv_head;
  int64_t begin;
  int64_t end;  // at most begin + kQueryTile
};

KELIX_FOR_EACH_ISA(void rope_store_kv(const RopeStoreKvArgs& args, int64_t begin, int64_t end);
                   void paged_attention_tile(const PagedAttentionArgs& args,
                                             const AttentionTile& tile);)

}  // namespace kelix
