// Arguments of the attention stem, shared by the CPU and CUDA kernels.
//
// A layer's cache is two arrays [num_pages, num_kv_heads, page_size, head_dim]: the tokens of one
// page and head are contiguous, which is what a decoding query streams. Both hold the dtype of the
// call's other tensors, or float8 (common/float8.h).
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

struct RopeStoreKvArgs {
  const void* qkv;           // [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
  const void* q_weight;      // [head_dim] or null: no norm
  const void* k_weight;      // [head_dim] or null
  const float* cos_sin;      // [max_positions, head_dim], cosines then sines
  const int32_t* positions;  // [num_tokens]
  const int64_t* slots;      // [num_tokens]; -1: not stored
  void* k_cache;
  void* v_cache;
  void* q;  // [num_tokens, num_heads, head_dim]
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  float eps;
  DType dtype;
  bool float8_cache;
};

// How a CUDA call of paged_attention spreads over CTAs; kernels/attention_plan.h makes it.
struct AttentionPlan {
  bool wide = false;   // rows can be loaded 16 bytes at a time, of a float8 cache 8
  bool tiles = false;  // on tensor cores
  // Units are the query rows that CTAs of their own work on, `splits` CTAs sharing the context of
  // each: every row of the call, or the requests that have exactly one.
  int64_t units = 0;
  int64_t splits = 1;
  bool unit_is_request = false;
};

struct PagedAttentionArgs {
  const void* q;  // [num_rows, num_heads, head_dim]
  const void* k_cache;
  const void* v_cache;
  const int32_t* page_table;    // [batch, max_pages]
  const int32_t* context_lens;  // [batch]
  const int32_t* query_start;   // [batch + 1]
  void* out;                    // [num_rows, num_heads, head_dim]
  int64_t num_rows;
  int64_t batch;
  int64_t max_pages;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t page_size;
  float scale;
  DType dtype;
  bool float8_cache;
  AttentionPlan plan = {};    // CUDA only
  float* partials = nullptr;  // CUDA only: partial_floats(args), where the plan splits
};

}  // namespace kelix
