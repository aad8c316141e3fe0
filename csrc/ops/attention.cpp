// rope_store_kv, paged_attention.
#include "cpu/attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/attention_plan.h"
#include "ops/launch.h"

namespace kelix {
namespace {

void require_index(Check& check, const char* name, int64_t index, int64_t first, int64_t limit) {
  check.rule(index >= first && index < limit, name, index, "must lie in [", first, ", ", limit,
             ")");
}

// Whether a cache is float8 instead of what the call's other tensors, of which `like` is one, are.
bool is_float8_cache(Check& check, const Tensor& k_cache, const Tensor& v_cache, const Tensor& like,
                     const char* like_name) {
  const ScalarType got = k_cache.scalar_type();
  const bool float8 = got == ScalarType::Float8_e4m3fn;
  check
      .rule(float8 || got == like.scalar_type(), "k_cache", got, "must be ", like.scalar_type(),
            " like ", like_name, ", or float8_e4m3fn")
      .rule(v_cache.scalar_type() == got, "v_cache", v_cache.scalar_type(), "must be ", got,
            " like k_cache");
  return float8;
}

// Indices of a CPU call are checked here; on a GPU that would cost a synchronisation per layer.
void check_indices(Check& check, const RopeStoreKvArgs& args, int64_t max_positions,
                   int64_t num_pages) {
  for (int64_t i = 0; i < args.num_tokens; ++i) {
    require_index(check, "positions", args.positions[i], 0, max_positions);
    require_index(check, "slots", args.slots[i], -1, num_pages * args.page_size);
  }
}

Tensor rope_store_kv(const Tensor& qkv, const std::optional<Tensor>& q_weight,
                     const std::optional<Tensor>& k_weight, const Tensor& cos_sin,
                     const Tensor& positions, const Tensor& slots, Tensor k_cache, Tensor v_cache,
                     int64_t num_heads, double eps) {
  Check check("rope_store_kv");
  check.shape(k_cache, "k_cache", {"P", "KV", "page", "hd"})
      .shape(v_cache, "v_cache", {"P", "KV", "page", "hd"})
      .contiguous(k_cache, "k_cache")
      .contiguous(v_cache, "v_cache");
  const int64_t head_dim = check["hd"];
  check.rule(num_heads > 0, "num_heads", num_heads, "must be positive")
      .rule(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "k_cache", k_cache,
            "must have an even head_dim of at most ", kMaxHeadDim)
      .shape(qkv, "qkv", {"T", Dim("(H+2*KV)*hd", (num_heads + 2 * check["KV"]) * head_dim)})
      .storage(qkv, "qkv")
      .shape(cos_sin, "cos_sin", {"max_pos", "hd"})
      .dtype(cos_sin, "cos_sin", ScalarType::Float)
      .shape(positions, "positions", {"T"})
      .dtype(positions, "positions", ScalarType::Int)
      .shape(slots, "slots", {"T"})
      .dtype(slots, "slots", ScalarType::Long);
  if (q_weight) check.shape(*q_weight, "q_weight", {"hd"}).storage(*q_weight, "q_weight");
  if (k_weight) check.shape(*k_weight, "k_weight", {"hd"}).storage(*k_weight, "k_weight");
  const bool float8_cache = is_float8_cache(check, k_cache, v_cache, qkv, "qkv");

  const Tensor input = dense(qkv);
  const Tensor table = dense(cos_sin);
  const Tensor position = dense(positions);
  const Tensor slot = dense(slots);
  const auto q_gain = dense(q_weight);
  const auto k_gain = dense(k_weight);
  Tensor q = new_tensor({check["T"], num_heads, head_dim}, input.scalar_type(), input);
  const RopeStoreKvArgs args{data(input),
                             data(q_gain),
                             data(k_gain),
                             table.const_data_ptr<float>(),
                             position.const_data_ptr<int32_t>(),
                             slot.const_data_ptr<int64_t>(),
                             k_cache.mutable_data_ptr(),
                             v_cache.mutable_data_ptr(),
                             q.mutable_data_ptr(),
                             check["T"],
                             num_heads,
                             check["KV"],
                             head_dim,
                             check["page"],
                             static_cast<float>(eps),
                             check.storage_type(),
                             float8_cache};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("rope_store_kv", input, rope_store_kv, args);
  } else {
    check_indices(check, args, check["max_pos"], check["P"]);
    const auto kernel = KELIX_CPU(rope_store_kv);
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, input.size(1)));
    torch_parallel_for()(args.num_tokens, grain,
                         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return q;
}

// The independent pieces of a CPU call; also checks what a wrong table would read out of bounds.
std::vector<AttentionTile> attention_tiles(Check& check, const PagedAttentionArgs& args,
                                           int64_t num_pages) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  std::vector<AttentionTile> tiles;
  for (int64_t request = 0; request < args.batch; ++request) {
    const int64_t begin = args.query_start[request];
    const int64_t end = args.query_start[request + 1];
    const int64_t context = args.context_lens[request];
    check
        .rule(0 <= begin && begin <= end && end <= args.num_rows, "query_start", end,
              "must rise from 0 to at most T=", args.num_rows, ", here from ", begin)
        .rule(
            context == 0 || (context >= end - begin && context <= args.max_pages * args.page_size),
            "context_lens", context, "must cover the request's ", end - begin,
            " rows and fit its page table of ", args.max_pages, " pages");
    for (int64_t page = 0; page * args.page_size < context; ++page) {
      require_index(check, "page_table", args.page_table[request * args.max_pages + page], 0,
                    num_pages);
    }
    const int64_t queries = (end - begin) * group;
    for (int64_t kv_head = 0; kv_head < args.num_kv_heads; ++kv_head) {
      for (int64_t q = 0; q < queries; q += kQueryTile) {
        tiles.push_back({request, kv_head, q, std::min(q + kQueryTile, queries)});
      }
    }
  }
  return tiles;
}

// Tiles worth a thread of their own: about a quarter million multiplications.
int64_t tile_grain(const PagedAttentionArgs& args, const std::vector<AttentionTile>& tiles) {
  int64_t work = 1;
  for (const AttentionTile& tile : tiles) {
    work += 2 * (tile.end - tile.begin) * args.context_lens[tile.request] * args.head_dim;
  }
  return 1 + static_cast<int64_t>(tiles.size()) * 262144 / work;
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const Tensor& page_table, const Tensor& context_lens,
                       const Tensor& query_start, double scale) {
  Check check("paged_attention");
  check.shape(q, "q", {"T", "H", "hd"})
      .storage(q, "q")
      .shape(k_cache, "k_cache", {"P", "KV", "page", "hd"})
      .shape(v_cache, "v_cache", {"P", "KV", "page", "hd"})
      .shape(page_table, "page_table", {"B", "max_pages"})
      .dtype(page_table, "page_table", ScalarType::Int)
      .shape(context_lens, "context_lens", {"B"})
      .dtype(context_lens, "context_lens", ScalarType::Int)
      .shape(query_start, "query_start", {Dim("B+1", check["B"] + 1)})
      .dtype(query_start, "query_start", ScalarType::Int)
      .rule(check["KV"] > 0 && check["H"] % check["KV"] == 0, "q", q,
            "must have a number of heads that KV=", check["KV"], " divides")
      .rule(check["hd"] <= kMaxHeadDim, "q", q, "must have head_dim of at most ", kMaxHeadDim)
      // A copy of the whole cache per call would hide a mistake of the caller.
      .contiguous(k_cache, "k_cache")
      .contiguous(v_cache, "v_cache");
  const bool float8_cache = is_float8_cache(check, k_cache, v_cache, q, "q");

  const Tensor queries = dense(q);
  const Tensor table = dense(page_table);
  const Tensor lens = dense(context_lens);
  const Tensor starts = dense(query_start);
  Tensor out = new_like(queries);
  PagedAttentionArgs args{data(queries),
                          data(k_cache),
                          data(v_cache),
                          table.const_data_ptr<int32_t>(),
                          lens.const_data_ptr<int32_t>(),
                          starts.const_data_ptr<int32_t>(),
                          out.mutable_data_ptr(),
                          check["T"],
                          check["B"],
                          check["max_pages"],
                          check["H"],
                          check["KV"],
                          check["hd"],
                          check["page"],
                          static_cast<float>(scale),
                          check.storage_type(),
                          float8_cache};
  if (uses_cuda(queries)) {
    args.plan = cuda::attention_plan(args);
    std::optional<Tensor>
        partials;  // memory of the stream: it may be reused once this call is queued
    if (args.plan.splits > 1) {
      partials = new_tensor({cuda::partial_floats(args)}, ScalarType::Float, queries);
      args.partials = static_cast<float*>(partials->mutable_data_ptr());
    }
    KELIX_LAUNCH_CUDA("paged_attention", queries, paged_attention, args);
  } else {
    const auto kernel = KELIX_CPU(paged_attention_tile);
    const std::vector<AttentionTile> tiles = attention_tiles(check, args, check["P"]);
    const int64_t grain = tile_grain(args, tiles);
    torch_parallel_for()(static_cast<int64_t>(tiles.size()), grain,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t i = begin; i < end; ++i)
                             kernel(args, tiles[static_cast<size_t>(i)]);
                         });
  }
  return out;
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_ATTENTION(m)                              \
  m.impl("rope_store_kv", TORCH_BOX(&kelix::rope_store_kv)); \
  m.impl("paged_attention", TORCH_BOX(&kelix::paged_attention))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_ATTENTION(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_ATTENTION(m); }
