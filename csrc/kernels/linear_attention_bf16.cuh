// Attention with ReLU features on the tensor cores: bfloat16, 32 channels a head. A CTA takes one
// head and kStateTokens tokens, a warp 32 of them.
//
// Fragments come straight from global memory, without a shuffle or shared memory: the order of the
// summed index and the names of rows and columns of a product are free, so each lane's loads are
// laid out to be its fragment. With g = lane / 4 and p = lane % 4 a lane
//   of the state loads channels 4 g .. 4 g + 3 of tokens p, p + 4, p + 8, p + 12;
//   of the output loads channels 8 p .. 8 p + 7 of tokens g and g + 8, and stores the same of y.
#pragma once

#include "common/tensor_core.cuh"
#include "kernels/linear_attention.cuh"

namespace kelix::cuda {

inline constexpr int kHeadChannels = 32;
inline constexpr int kHeadFloats = kHeadChannels * (kHeadChannels + 1);  // state and key sum
inline constexpr int kWarpTokens = 32;
inline constexpr int kMmaTokens = 16;  // rows of A, and its depth
inline constexpr int kHeadWarps = kAttentionThreads / kWarpSize;
static_assert(kHeadWarps * kWarpTokens == kStateTokens);

// What one CTA works on.
struct HeadPiece {
  int64_t batch;
  int64_t head;   // of its image
  int64_t piece;  // of its tokens

  // Heads are neighbours in memory, so they are neighbours in the grid.
  __device__ __forceinline__ explicit HeadPiece(const LinearAttentionArgs& args)
      : batch(blockIdx.x / args.heads / args.pieces),
        head(blockIdx.x % args.heads),
        piece(blockIdx.x / args.heads % args.pieces) {}

  __device__ __forceinline__ const bf16* part(const LinearAttentionArgs& args, int part,
                                              int64_t token) const {
    return static_cast<const bf16*>(args.qkv) +
           (((batch * args.tokens + token) * 3 + part) * args.heads + head) * kHeadChannels;
  }
};

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const bf16 pair[2] = {from_float<bf16>(low), from_float<bf16>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ uint32_t bf16_pair(bf16 low, bf16 high) {
  const bf16 pair[2] = {low, high};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// kCount weights of the norm of one head, ones without norms: a product with one rounds to itself.
template <int kCount>
__device__ __forceinline__ void load_norm(const void* norm, const HeadPiece& at, int channel,
                                          float (&weight)[kCount]) {
  if (norm != nullptr) {
    load_floats(static_cast<const bf16*>(norm) + at.head * kHeadChannels + channel, weight);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) weight[i] = 1.0f;
}

__device__ __forceinline__ float row_scale(const LinearAttentionArgs& args, const HeadPiece& at,
                                           int part, int64_t token) {
  if (args.scales == nullptr || token >= args.tokens) return 1.0f;
  return args.scales[(at.batch * args.tokens + token) * 2 + part];
}

inline constexpr int kStateChannels = 4;  // of a lane
inline constexpr int kStateLoads = kWarpTokens / 4;

// k and v of a lane's tokens, zero past the last one.
struct KeysAndValues {
  bf16 k[kStateLoads][kStateChannels];
  bf16 v[kStateLoads][kStateChannels];
  float scale[kStateLoads];

  __device__ __forceinline__ KeysAndValues(const LinearAttentionArgs& args, const HeadPiece& at,
                                           int64_t first_token, int channel) {
#pragma unroll
    for (int i = 0; i < kStateLoads; ++i) {
      const int64_t token = first_token + 4 * i;
      scale[i] = row_scale(args, at, 1, token);
      if (token < args.tokens) {
        load_vector(at.part(args, 1, token) + channel, k[i]);
        load_vector(at.part(args, 2, token) + channel, v[i]);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kStateChannels; ++c) k[i][c] = v[i][c] = from_float<bf16>(0.0f);
    }
  }
};

// k^T v and k^T 1 of a warp's tokens. Row r of A is channel 4 (r % 8) + 2 m + r / 8 of product m,
// column c of B channel 4 c + n of product n.
struct StateSums {
  float state[2][kStateChannels][4] = {};
  float keys[2][4] = {};

  // Tokens [4 step, 4 step + 4) of a lane.
  __device__ __forceinline__ void add(const KeysAndValues& in, int step,
                                      const float (&weight)[kStateChannels]) {
    constexpr uint32_t kOnes = 0x3f803f80;
    float k[4][kStateChannels];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int c = 0; c < kStateChannels; ++c) {
        const int load = 4 * step + t;
        k[t][c] = feature<bf16>(to_float(in.k[load][c]), in.scale[load], weight[c]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint32_t a[4] = {
          bf16_pair(k[0][2 * m], k[1][2 * m]), bf16_pair(k[0][2 * m + 1], k[1][2 * m + 1]),
          bf16_pair(k[2][2 * m], k[3][2 * m]), bf16_pair(k[2][2 * m + 1], k[3][2 * m + 1])};
#pragma unroll
      for (int n = 0; n < kStateChannels; ++n) {
        mma_bf16(state[m][n], a, bf16_pair(in.v[4 * step][n], in.v[4 * step + 1][n]),
                 bf16_pair(in.v[4 * step + 2][n], in.v[4 * step + 3][n]));
      }
      mma_bf16(keys[m], a, kOnes, kOnes);
    }
  }

  // Writes the state by rows, then the key sum.
  __device__ __forceinline__ void store(float* to) const {
    const int g = threadIdx.x % kWarpSize / 4;
    const int p = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kStateChannels; ++i) {
      const int m = i / 2;
      const int d = i % 2 * 2;  // of the accumulator's two rows
      const int row = kStateChannels * g + i;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float values[kStateChannels] = {state[m][0][d + half], state[m][1][d + half],
                                              state[m][2][d + half], state[m][3][d + half]};
        store_vector(to + row * kHeadChannels + 8 * p + kStateChannels * half, values);
      }
      if (p == 0) to[kHeadChannels * kHeadChannels + row] = keys[m][d];
    }
  }
};

__global__ void __launch_bounds__(kAttentionThreads)
    linear_attention_state_bf16_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, partial, [kHeadWarps][kHeadFloats]);
  const HeadPiece at(args);
  const int warp = threadIdx.x / kWarpSize;
  const int channel = threadIdx.x % kWarpSize / 4 * kStateChannels;
  const KeysAndValues in(args, at, at.piece * kStateTokens + warp * kWarpTokens + threadIdx.x % 4,
                         channel);
  float weight[kStateChannels];
  load_norm(args.k_norm, at, channel, weight);
  StateSums sums;
#pragma unroll
  for (int step = 0; step < kWarpTokens / kMmaTokens; ++step) sums.add(in, step, weight);
  sums.store(partial[warp]);
  __syncthreads();
  float* state = args.states +
                 ((at.batch * args.heads + at.head) * args.pieces + at.piece) * args.state_floats;
  for (int i = threadIdx.x; i < kHeadFloats; i += kAttentionThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kHeadWarps; ++w) sum += partial[w][i];
    state[i] = sum;
  }
}

// Place of a state's element in shared memory. Rows are turned so that the lanes of a warp, which
// read columns of rows 8 apart, meet different banks.
__device__ __forceinline__ int turned(int row, int column) {
  return row * kHeadChannels + (column + row / 8 * 2) % kHeadChannels;
}

// Two float32 as the sum of two bf16 pairs, good to 17 bits: the products with q stay as exact as
// float32 ones would be to the result's 8.
struct SplitPair {
  uint32_t high;
  uint32_t low;

  __device__ __forceinline__ void set(float first, float second) {
    const float a = round_to<bf16>(first);
    const float b = round_to<bf16>(second);
    high = bf16_pair(a, b);
    low = bf16_pair(first - a, second - b);
  }
};

inline constexpr int kOutputChannels = 8;  // of a lane

// A head's state and key sum as B: depth 16 s + 2 p + {0, 1} and 8 more is channel
// 8 p + 4 s + {0, 1} and {2, 3}; column c of product n is channel 8 (c / 2) + 2 n + c % 2, and
// every column of the last product is the key sum.
struct StateFragments {
  SplitPair pairs[2][5][2];

  __device__ __forceinline__ explicit StateFragments(const float* state, const float* keys) {
    const int g = threadIdx.x % kWarpSize / 4;
    const int p = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 8 * p + 4 * s + 2 * half;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = 8 * (g / 2) + 2 * n + g % 2;
          pairs[s][n][half].set(state[turned(row, column)], state[turned(row + 1, column)]);
        }
        pairs[s][4][half].set(keys[row], keys[row + 1]);
      }
    }
  }
};

// The queries of two tokens of a lane, 8 apart, zero past the last one.
struct Queries {
  bf16 q[2][kOutputChannels];
  float scale[2];

  __device__ __forceinline__ void load(const LinearAttentionArgs& args, const HeadPiece& at,
                                       int64_t token, int channel) {
#pragma unroll
    for (int i = 0; i < 2; ++i, token += 8) {
      scale[i] = row_scale(args, at, 0, token);
      if (token < args.tokens) {
        load_vector(at.part(args, 0, token) + channel, q[i]);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kOutputChannels; ++c) q[i][c] = from_float<bf16>(0.0f);
    }
  }

  // A of product s: channels 8 p + 4 s + {0, 1}, then {2, 3}.
  __device__ __forceinline__ void fragment(int s, const float (&weight)[kOutputChannels],
                                           uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = 4 * s + i / 2 * 2;
      a[i] = bf16_pair(feature<bf16>(to_float(q[i % 2][c]), scale[i % 2], weight[c]),
                       feature<bf16>(to_float(q[i % 2][c + 1]), scale[i % 2], weight[c + 1]));
    }
  }
};

// A lane's channels of y of two tokens.
__device__ __forceinline__ void store_outputs(const LinearAttentionArgs& args, const HeadPiece& at,
                                              int64_t token, int channel, const float (&d)[5][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i, token += 8) {
    if (token >= args.tokens) return;
    const float divisor = d[4][2 * i] + args.eps;
    float y[kOutputChannels];
#pragma unroll
    for (int c = 0; c < kOutputChannels; ++c) y[c] = d[c / 2][2 * i + c % 2] / divisor;
    const int64_t row = (at.batch * args.tokens + token) * args.heads + at.head;
    store_floats(static_cast<bf16*>(args.y) + row * kHeadChannels + channel, y);
  }
}

__global__ void __launch_bounds__(kAttentionThreads)
    linear_attention_output_bf16_kernel(LinearAttentionArgs args) {
  constexpr int kTiles = kWarpTokens / kMmaTokens;
  KELIX_SHARED(float, state, [kHeadChannels * kHeadChannels]);
  KELIX_SHARED(float, keys, [kHeadChannels]);
  const HeadPiece at(args);
  const int channel = threadIdx.x % 4 * kOutputChannels;
  const int64_t first_token =
      at.piece * kStateTokens + threadIdx.x / kWarpSize * kWarpTokens + threadIdx.x % kWarpSize / 4;
  Queries queries[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    queries[tile].load(args, at, first_token + tile * kMmaTokens, channel);
  }
  float weight[kOutputChannels];
  load_norm(args.q_norm, at, channel, weight);
  const int64_t head = at.batch * args.heads + at.head;
  for (int i = threadIdx.x; i < kHeadFloats; i += kAttentionThreads) {
    const float value = state_element(args, head, i);
    if (i < kHeadChannels * kHeadChannels) {
      state[turned(i / kHeadChannels, i % kHeadChannels)] = value;
    } else {
      keys[i % kHeadChannels] = value;
    }
  }
  __syncthreads();
  const StateFragments fragments(state, keys);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float d[5][4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[4];
      queries[tile].fragment(s, weight, a);
#pragma unroll
      for (int n = 0; n < 5; ++n) {
        const SplitPair(&b)[2] = fragments.pairs[s][n];
        mma_bf16(d[n], a, b[0].low, b[1].low);
        mma_bf16(d[n], a, b[0].high, b[1].high);
      }
    }
    store_outputs(args, at, first_token + tile * kMmaTokens, channel, d);
  }
}

}  // namespace kelix::cuda
