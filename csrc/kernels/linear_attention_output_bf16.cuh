// The outputs of the release's heads: a warp takes 64 tokens.
#pragma once

#include "kernels/linear_attention_head.cuh"

namespace kelix::cuda {

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
    const float inverse = 1.0f / (d[4][2 * i] + args.eps);
    float y[kOutputChannels];
#pragma unroll
    for (int c = 0; c < kOutputChannels; ++c) y[c] = d[c / 2][2 * i + c % 2] * inverse;
    const int64_t row = (at.batch * args.tokens + token) * args.heads + at.head;
    store_floats(static_cast<bf16*>(args.y) + row * kHeadChannels + channel, y);
  }
}

inline constexpr int kOutputThreads = 128;  // few warps: each builds the fragments of the state
inline constexpr int kOutputTiles =
    static_cast<int>(kStateTokens) / kMmaTokens / (kOutputThreads / kWarpSize);

// Adds up the pieces of a head's state, always in the same order, into shared memory.
__device__ __forceinline__ void gather_state(const float* pieces, int64_t count, float* state,
                                             float* keys) {
  constexpr int kLoads = (kHeadFloats + 4 * kOutputThreads - 1) / (4 * kOutputThreads);
  float sum[kLoads][4] = {};
#pragma unroll 2
  for (int64_t piece = 0; piece < count; ++piece) {
#pragma unroll
    for (int load = 0; load < kLoads; ++load) {
      const int i = 4 * (threadIdx.x + load * kOutputThreads);
      if (i >= kHeadFloats) continue;
      float part[4];
      load_vector(pieces + piece * kHeadFloats + i, part);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[load][c] += part[c];
    }
  }
#pragma unroll
  for (int load = 0; load < kLoads; ++load) {
    const int row = (threadIdx.x + load * kOutputThreads) / (kHeadChannels / 4);
    const int column = threadIdx.x % (kHeadChannels / 4) * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (row < kHeadChannels) state[turned(row, column + c)] = sum[load][c];
      if (row == kHeadChannels) keys[column + c] = sum[load][c];
    }
  }
}

__global__ void __launch_bounds__(kOutputThreads)
    linear_attention_output_bf16_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, state, [kHeadChannels * kHeadChannels]);
  KELIX_SHARED(float, keys, [kHeadChannels]);
  const HeadPiece at(args);
  const int channel = threadIdx.x % 4 * kOutputChannels;
  const int64_t first_token = at.piece * kStateTokens +
                              threadIdx.x / kWarpSize * kOutputTiles * kMmaTokens +
                              threadIdx.x % kWarpSize / 4;
  Queries queries[kOutputTiles];
#pragma unroll
  for (int tile = 0; tile < kOutputTiles; ++tile) {
    queries[tile].load(args, at, first_token + tile * kMmaTokens, channel);
  }
  float weight[kOutputChannels];
  load_norm(args.q_norm, at, channel, weight);
  gather_state(at.state(args), args.pieces, state, keys);
  __syncthreads();
  const StateFragments fragments(state, keys);
#pragma unroll
  for (int tile = 0; tile < kOutputTiles; ++tile) {
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
