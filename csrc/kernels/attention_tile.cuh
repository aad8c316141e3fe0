// Paged attention of bf16 and fp16 on tensor cores (m16n8k16). The rows of a product are queries:
// the query heads of a KV head, and in a prefill also neighbouring rows, query i being head
// i % group of row i / group. All warps stream the same keys; in the decode form they share 16
// queries and take 16 keys of a stage each, in the prefill form each takes 16 queries and all keys.
#pragma once

#include "common/tensor_core.cuh"
#include "kernels/attention_stream.cuh"
#include "kernels/attention_widen.cuh"

namespace kelix::cuda {

// Queries of a CTA: begin .. end of those that belong to one request and KV head.
struct QueryTile {
  int64_t first_row;  // of the queries 0 .. group
  int64_t kv_head;
  int group;
  int begin;
  int end;
  int first_visible;  // keys that queries 0 .. group see; a row further on sees one more

  __device__ int visible(int query) const { return first_visible + query / group; }
  __device__ int64_t offset(const PagedAttentionArgs& args, int query) const {
    const int64_t row = first_row + query / group;
    return (row * args.num_heads + kv_head * group + query % group) * args.head_dim;
  }
};

// A warp's 16 queries against the keys of a stage, in the fragments of the mma: a thread holds
// columns of two queries, kSlots apart.
template <class T, int kDim, int kKeys>
class QueryWarp {
 public:
  static constexpr int kRows = 2;  // queries of a thread
  static constexpr int kRowStep = 8;

  // The first of this thread's queries and of its columns in a product of 8 columns.
  __device__ static int row() { return static_cast<int>(threadIdx.x) % kWarpSize / 4; }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

  // Loads queries first .. first + 16 of the tile; past its end they are zero.
  __device__ QueryWarp(const PagedAttentionArgs& args, const QueryTile& tile, int first)
      : scale_(args.scale * kLog2E) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int query = first + row() + i * kRowStep;
      const bool present = query < tile.end;
      const T* q = static_cast<const T*>(args.q) + (present ? tile.offset(args, query) : 0);
      visible_[i] = present ? tile.visible(query) : 0;
#pragma unroll
      for (int part = 0; part < kDim / 8; ++part) {
        const int d = part * 8 + column();
        queries_[part / 2][part % 2 * kRows + i] =
            present && d < args.head_dim ? load_4_bytes(q + d) : 0;
      }
    }
  }

  // Takes in kKeys keys and values (rows of `stride` elements), the first being number `token`.
  __device__ __forceinline__ void attend(const T* keys, const T* values, int stride, int token) {
    float scores[kKeys / 8][4] = {};
    score(keys, stride, scores);
    weigh(token, scores);
    accumulate(values, stride, scores);
  }

  // After the last keys: sums of weights over the four threads that share a query.
  __device__ void finish() {
#pragma unroll
    for (float& norm : norm_) norm = quad(norm, [](float a, float b) { return a + b; });
  }

  __device__ float max(int i) const { return max_[i]; }
  __device__ float norm(int i) const { return norm_[i]; }
  // Elements d and d + 1 of query i, d = part * 8 + column().
  __device__ float sum(int part, int i, int element) const { return sums_[part][2 * i + element]; }

 private:
  template <class Combine>
  __device__ static float quad(float value, Combine combine) {
    value = combine(value, shuffle_xor(value, 1));
    return combine(value, shuffle_xor(value, 2));
  }

  __device__ __forceinline__ void score(const T* keys, int stride,
                                        float (&scores)[kKeys / 8][4]) const {
    const int lane = threadIdx.x % kWarpSize;
    const T* mine = keys + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
#pragma unroll
      for (int key = 0; key < kKeys / 16; ++key) {
        uint32_t fragment[4];
        load_matrix_x4(fragment, mine + key * 16 * stride + d * 16);
        mma<T>(scores[2 * key], queries_[d], fragment[0], fragment[1]);
        mma<T>(scores[2 * key + 1], queries_[d], fragment[2], fragment[3]);
      }
    }
  }

  // Leaves query i the first `seen` keys. Only the last stages of a context have any to hide.
  __device__ __forceinline__ static void hide(int i, int seen, float (&scores)[kKeys / 8][4]) {
    if (seen >= kKeys) return;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (n * 8 + e >= seen) scores[n][2 * i + e] = -INFINITY;
      }
    }
  }

  // Scores become weights; earlier sums are brought to the new largest score.
  __device__ __forceinline__ void weigh(int token, float (&scores)[kKeys / 8][4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        scores[n][2 * i] *= scale_;
        scores[n][2 * i + 1] *= scale_;
      }
      hide(i, visible_[i] - token - column(), scores);
      float max = max_[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        max = fmaxf(max, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      }
      max = quad(max, [](float a, float b) { return fmaxf(a, b); });
      const float base = max == -INFINITY ? 0.0f : max;  // no key seen yet: all weights are zero
      const float shrink = exp2_approx(max_[i] - base);
      max_[i] = max;
      norm_[i] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = scores[n][2 * i + e];
          weight = exp2_approx(weight - base);
          norm_[i] += weight;
        }
      }
#pragma unroll
      for (auto& sum : sums_) {
        sum[2 * i] *= shrink;
        sum[2 * i + 1] *= shrink;
      }
    }
  }

  __device__ __forceinline__ void accumulate(const T* values, int stride,
                                             const float (&weights)[kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize;
    const T* mine = values + lane % 16 * stride + lane / 16 * 8;
#pragma unroll
    for (int key = 0; key < kKeys / 16; ++key) {
      const float (&first)[4] = weights[2 * key];
      const float (&second)[4] = weights[2 * key + 1];
      const uint32_t a[4] = {pack<T>(first[0], first[1]), pack<T>(first[2], first[3]),
                             pack<T>(second[0], second[1]), pack<T>(second[2], second[3])};
#pragma unroll
      for (int d = 0; d < kDim / 16; ++d) {
        uint32_t fragment[4];
        load_matrix_x4_transposed(fragment, mine + key * 16 * stride + d * 16);
        mma<T>(sums_[2 * d], a, fragment[0], fragment[1]);
        mma<T>(sums_[2 * d + 1], a, fragment[2], fragment[3]);
      }
    }
  }

  float scale_;
  int visible_[kRows];
  uint32_t queries_[kDim / 16][4];
  float max_[kRows] = {-INFINITY, -INFINITY};
  float norm_[kRows] = {};
  float sums_[kDim / 8][4] = {};
};

}  // namespace kelix::cuda
