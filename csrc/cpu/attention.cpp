// RoPE with the cache write, and attention over pages.
//
// Attention walks the pages of one KV head once for a tile of queries (the heads of a group, and
// the rows of a prefill chunk), with an online softmax (Milakov & Gimelshein 2018): the running
// maximum, the running sum and a float32 accumulator per query. A float8 cache is widened to
// float32 once per tile, page by page, and then read as if it had been stored so.
#include "cpu/attention.h"

#include <cmath>
#include <type_traits>

#include "cpu/row_stats.h"
#include "cpu/simd.h"

namespace kelix::KELIX_ISA {
namespace {

// Rounds to T, and then to what the cache holds where that is another type.
template <class T, class Out>
Out stored(float v) {
  if constexpr (std::is_same_v<T, Out>) {
    return from_float<T>(v);
  } else {
    return from_float<Out>(round_to<T>(v));
  }
}

// One head: optional RMSNorm rounded twice, then the half-split rotation with one rounding,
// and another where it goes to a float8 cache.
template <class T, class Out>
void norm_rope(const T* x, const T* weight, const float* cos_sin, int64_t head_dim, float eps,
               Out* out) {
  const int64_t half = head_dim / 2;
  float normed[kMaxHeadDim];
  if (weight != nullptr) {
    const float scale = 1.0f / std::sqrt(mean_square(x, head_dim) + eps);
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i) {
      normed[i] = round_to<T>(round_to<T>(to_float(x[i]) * scale) * to_float(weight[i]));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < head_dim; ++i) normed[i] = to_float(x[i]);
  }
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    out[i] = stored<T, Out>(normed[i] * cos[i] - normed[half + i] * sin[i]);
    out[half + i] = stored<T, Out>(normed[half + i] * cos[i] + normed[i] * sin[i]);
  }
}

template <class T>
void store_row(const T* from, int64_t head_dim, T* to) {
  std::memcpy(to, from, static_cast<size_t>(head_dim) * sizeof(T));
}

template <class T>
void store_row(const T* from, int64_t head_dim, float8* to) {
#pragma omp simd
  for (int64_t d = 0; d < head_dim; ++d) to[d] = from_float<float8>(to_float(from[d]));
}

template <class T, class Cache>
void rope_store_kv_rows(const RopeStoreKvArgs& args, int64_t begin, int64_t end) {
  const int64_t head_dim = args.head_dim;
  const int64_t all_heads = args.num_heads + 2 * args.num_kv_heads;
  for (int64_t token = begin; token < end; ++token) {
    const T* q = static_cast<const T*>(args.qkv) + token * all_heads * head_dim;
    const T* k = q + args.num_heads * head_dim;
    const T* v = k + args.num_kv_heads * head_dim;
    const float* cos_sin = args.cos_sin + args.positions[token] * head_dim;
    T* q_out = static_cast<T*>(args.q) + token * args.num_heads * head_dim;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      norm_rope(q + head * head_dim, static_cast<const T*>(args.q_weight), cos_sin, head_dim,
                args.eps, q_out + head * head_dim);
    }
    const int64_t slot = args.slots[token];
    if (slot < 0) continue;
    const int64_t page = slot / args.page_size;
    const int64_t offset = slot % args.page_size;
    for (int64_t head = 0; head < args.num_kv_heads; ++head) {
      const int64_t at = ((page * args.num_kv_heads + head) * args.page_size + offset) * head_dim;
      norm_rope(k + head * head_dim, static_cast<const T*>(args.k_weight), cos_sin, head_dim,
                args.eps, static_cast<Cache*>(args.k_cache) + at);
      store_row(v + head * head_dim, head_dim, static_cast<Cache*>(args.v_cache) + at);
    }
  }
}

constexpr int64_t kQueryBlock = 4;   // queries that share one load of a key or value
constexpr int64_t kDimBlock = 32;    // accumulators of a query block: 8 AVX-512 registers
constexpr int64_t kTokenBlock = 64;  // keys scored before the softmax is brought up to date

// What a tile keeps while it walks the context.
struct TileState {
  float q[kQueryTile * kMaxHeadDim];
  float sum[kQueryTile * kMaxHeadDim];
  float scores[kQueryTile * kTokenBlock];
  float max[kQueryTile];
  float norm[kQueryTile];
  int64_t visible[kQueryTile];  // keys this query may see
};

// Rows of the cache as they are multiplied; `wide` is for those that are widened first.
template <class T>
const T* readable(const T* rows, int64_t, float*) {
  return rows;
}

[[maybe_unused]] const float* readable(const float8* rows, int64_t count, float* wide) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) wide[i] = to_float(rows[i]);
  return wide;
}

// Asks for a row that the next phase will read: pages lie scattered, so the hardware would start
// over at each of them. Into the L2 cache (locality 2): a phase's rows do not fit into the L1.
template <class T>
void prefetch_row(const T* row, int64_t head_dim) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t size = head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(bytes + at, 0, 2);
}

// scores[query, token] = q . k for a block of queries and `tokens` consecutive keys.
template <class T, class Cache>
void score_block(TileState& state, int64_t query, int64_t queries, const T* keys, int64_t tokens,
                 int64_t head_dim, int64_t first_score, const Cache* upcoming) {
  const float* q0 = state.q + query * head_dim;
  // A short block repeats its last query; the repeated scores are simply not stored.
  const float* q1 = q0 + (queries > 1 ? 1 : 0) * head_dim;
  const float* q2 = q0 + (queries > 2 ? 2 : queries - 1) * head_dim;
  const float* q3 = q0 + (queries > 3 ? 3 : queries - 1) * head_dim;
  for (int64_t token = 0; token < tokens; ++token) {
    const T* key = keys + token * head_dim;
    if (upcoming != nullptr) prefetch_row(upcoming + token * head_dim, head_dim);
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t d = 0; d < head_dim; ++d) {
      const float k = to_float(key[d]);
      s0 += q0[d] * k;
      s1 += q1[d] * k;
      s2 += q2[d] * k;
      s3 += q3[d] * k;
    }
    const float s[kQueryBlock] = {s0, s1, s2, s3};
    for (int64_t i = 0; i < queries; ++i) {
      state.scores[(query + i) * kTokenBlock + first_score + token] = s[i];
    }
  }
}

// sum[query, :] += weights[query, token] * v[token, :] for a full block of queries.
template <class T, class Cache>
void accumulate_block(TileState& state, int64_t query, const T* values, int64_t tokens,
                      int64_t head_dim, int64_t first_score, const Cache* upcoming) {
  const float* weights = state.scores + query * kTokenBlock + first_score;
  int64_t d0 = 0;
  for (; d0 + kDimBlock <= head_dim; d0 += kDimBlock) {
    float a0[kDimBlock], a1[kDimBlock], a2[kDimBlock], a3[kDimBlock];
    float* sum = state.sum + query * head_dim + d0;
#pragma omp simd
    for (int64_t d = 0; d < kDimBlock; ++d) {
      a0[d] = sum[d];
      a1[d] = sum[head_dim + d];
      a2[d] = sum[2 * head_dim + d];
      a3[d] = sum[3 * head_dim + d];
    }
    for (int64_t token = 0; token < tokens; ++token) {
      const T* value = values + token * head_dim + d0;
      if (upcoming != nullptr && d0 == 0) prefetch_row(upcoming + token * head_dim, head_dim);
      const float w0 = weights[token];
      const float w1 = weights[kTokenBlock + token];
      const float w2 = weights[2 * kTokenBlock + token];
      const float w3 = weights[3 * kTokenBlock + token];
#pragma omp simd
      for (int64_t d = 0; d < kDimBlock; ++d) {
        const float v = to_float(value[d]);
        a0[d] += w0 * v;
        a1[d] += w1 * v;
        a2[d] += w2 * v;
        a3[d] += w3 * v;
      }
    }
#pragma omp simd
    for (int64_t d = 0; d < kDimBlock; ++d) {
      sum[d] = a0[d];
      sum[head_dim + d] = a1[d];
      sum[2 * head_dim + d] = a2[d];
      sum[3 * head_dim + d] = a3[d];
    }
  }
  for (int64_t i = 0; i < kQueryBlock; ++i) {
    float* sum = state.sum + (query + i) * head_dim;
    for (int64_t token = 0; token < tokens; ++token) {
      const float w = weights[i * kTokenBlock + token];
      for (int64_t d = d0; d < head_dim; ++d) sum[d] += w * to_float(values[token * head_dim + d]);
    }
  }
}

// Turns the scores of `tokens` keys from `first_token` on into weights and rescales the sums.
void update_softmax(TileState& state, int64_t queries, int64_t first_token, int64_t tokens,
                    int64_t head_dim, float scale) {
  for (int64_t query = 0; query < queries; ++query) {
    float* scores = state.scores + query * kTokenBlock;
    int64_t seen = state.visible[query] - first_token;
    seen = seen < 0 ? 0 : (seen > tokens ? tokens : seen);
    float max = state.max[query];
    for (int64_t t = 0; t < seen; ++t) {
      scores[t] *= scale;
      max = scores[t] > max ? scores[t] : max;
    }
    if (seen > 0 && max > state.max[query]) {
      const float shrink = exp_simd(state.max[query] - max);
      state.max[query] = max;
      state.norm[query] *= shrink;
      float* sum = state.sum + query * head_dim;
#pragma omp simd
      for (int64_t d = 0; d < head_dim; ++d) sum[d] *= shrink;
    }
    float norm = 0;
#pragma omp simd reduction(+ : norm)
    for (int64_t t = 0; t < seen; ++t) {
      scores[t] = exp_simd(scores[t] - max);
      norm += scores[t];
    }
    for (int64_t t = seen; t < tokens; ++t) scores[t] = 0;
    state.norm[query] += norm;
  }
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

template <class T, class Cache>
void attention_tile(const PagedAttentionArgs& args, const AttentionTile& tile) {
  const int64_t head_dim = args.head_dim;
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t first_row = args.query_start[tile.request];
  const int64_t num_rows = args.query_start[tile.request + 1] - first_row;
  const int64_t context = args.context_lens[tile.request];
  const int64_t queries = tile.end - tile.begin;

  TileState state;
  int64_t keys_needed = 0;
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t row = (tile.begin + i) / group;
    const int64_t head = tile.kv_head * group + (tile.begin + i) % group;
    const T* q =
        static_cast<const T*>(args.q) + ((first_row + row) * args.num_heads + head) * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) state.q[i * head_dim + d] = to_float(q[d]);
    state.visible[i] = context == 0 ? 0 : context - num_rows + row + 1;
    if (state.visible[i] > keys_needed) keys_needed = state.visible[i];
    state.max[i] = -__builtin_inff();
    state.norm[i] = 0;
  }
  // The sums of a short last block are computed and thrown away: clear whole blocks.
  const int64_t padded = round_up(queries, kQueryBlock);
  for (int64_t i = 0; i < padded * head_dim; ++i) state.sum[i] = 0;
  for (int64_t i = queries * kTokenBlock; i < padded * kTokenBlock; ++i) state.scores[i] = 0;

  const int32_t* pages = args.page_table + tile.request * args.max_pages;
  const Cache* all_keys = static_cast<const Cache*>(args.k_cache);
  const Cache* all_values = static_cast<const Cache*>(args.v_cache);
  float wide[kTokenBlock * kMaxHeadDim];  // left alone but for a float8 cache
  // Where a token's key (and value) starts, and how many of its page follow before `last`.
  const auto offset_of = [&](int64_t token) {
    const int64_t page = pages[token / args.page_size];
    return ((page * args.num_kv_heads + tile.kv_head) * args.page_size + token % args.page_size) *
           head_dim;
  };
  const auto run_of = [&](int64_t token, int64_t last) {
    const int64_t in_page = args.page_size - token % args.page_size;
    return in_page < last - token ? in_page : last - token;
  };
  for (int64_t first = 0; first < keys_needed; first += kTokenBlock) {
    const int64_t last = first + kTokenBlock < keys_needed ? first + kTokenBlock : keys_needed;
    for (int64_t token = first, run; token < last; token += run) {
      run = run_of(token, last);
      const auto* keys = readable(all_keys + offset_of(token), run * head_dim, wide);
      const Cache* upcoming = all_values + offset_of(token);
      for (int64_t q = 0; q < queries; q += kQueryBlock) {
        const int64_t block = queries - q < kQueryBlock ? queries - q : kQueryBlock;
        score_block(state, q, block, keys, run, head_dim, token - first,
                    q == 0 ? upcoming : nullptr);
      }
    }
    update_softmax(state, queries, first, last - first, head_dim, args.scale);
    for (int64_t token = first, run; token < last; token += run) {
      run = run_of(token, last);
      const auto* values = readable(all_values + offset_of(token), run * head_dim, wide);
      const bool more = token + kTokenBlock + run <= keys_needed;
      const Cache* upcoming = more ? all_keys + offset_of(token + kTokenBlock) : nullptr;
      for (int64_t q = 0; q < padded; q += kQueryBlock) {
        accumulate_block(state, q, values, run, head_dim, token - first,
                         q == 0 ? upcoming : nullptr);
      }
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t row = (tile.begin + i) / group;
    const int64_t head = tile.kv_head * group + (tile.begin + i) % group;
    T* out = static_cast<T*>(args.out) + ((first_row + row) * args.num_heads + head) * head_dim;
    const float inverse = state.norm[i] > 0 ? 1.0f / state.norm[i] : 0.0f;
    for (int64_t d = 0; d < head_dim; ++d) {
      out[d] = from_float<T>(state.sum[i * head_dim + d] * inverse);
    }
  }
}

// Calls f with the storage types of the call's tensors and of its cache.
template <class Args, class F>
void with_cache_types(const Args& args, const F& f) {
  with_dtype(args.dtype, [&](auto type) {
    if (args.float8_cache) {
      f(type, float8{});
    } else {
      f(type, type);
    }
  });
}

}  // namespace

void rope_store_kv(const RopeStoreKvArgs& args, int64_t begin, int64_t end) {
  with_cache_types(args, [&](auto type, auto cache) {
    rope_store_kv_rows<decltype(type), decltype(cache)>(args, begin, end);
  });
}

void paged_attention_tile(const PagedAttentionArgs& args, const AttentionTile& tile) {
  with_cache_types(args, [&](auto type, auto cache) {
    attention_tile<decltype(type), decltype(cache)>(args, tile);
  });
}

}  // namespace kelix::KELIX_ISA
