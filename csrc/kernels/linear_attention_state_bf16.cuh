// The state of the release's heads: a warp takes 32 tokens, shared memory adds up the warps.
#pragma once

#include "kernels/linear_attention_head.cuh"

namespace kelix::cuda {

inline constexpr int kStateChannels = 4;  // of a lane
inline constexpr int kStateLoads = 8;
inline constexpr int kStateWarpTokens = 4 * kStateLoads;
inline constexpr int kStateWarps = kLinearAttentionThreads / kWarpSize;
static_assert(kStateWarps * kStateWarpTokens == kStateTokens);

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

  // Writes the state by rows, then the key sum, to shared memory.
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
        *reinterpret_cast<float4*>(to + row * kHeadChannels + 8 * p + kStateChannels * half) =
            make_float4(state[m][0][d + half], state[m][1][d + half], state[m][2][d + half],
                        state[m][3][d + half]);
      }
      if (p == 0) to[kHeadChannels * kHeadChannels + row] = keys[m][d];
    }
  }
};

__global__ void __launch_bounds__(kLinearAttentionThreads)
    linear_attention_state_bf16_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, partial, [kStateWarps][kHeadFloats]);
  const HeadPiece at(args);
  const int warp = threadIdx.x / kWarpSize;
  const int channel = threadIdx.x % kWarpSize / 4 * kStateChannels;
  const KeysAndValues in(
      args, at, at.piece * kStateTokens + warp * kStateWarpTokens + threadIdx.x % 4, channel);
  float weight[kStateChannels];
  load_norm(args.k_norm, at, channel, weight);
  StateSums sums;
#pragma unroll
  for (int step = 0; step < kStateWarpTokens / kMmaTokens; ++step) sums.add(in, step, weight);
  sums.store(partial[warp]);
  __syncthreads();
  float* state = args.states +
                 ((at.batch * args.heads + at.head) * args.pieces + at.piece) * args.state_floats;
  for (int i = threadIdx.x; i < kHeadFloats; i += kLinearAttentionThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kStateWarps; ++w) sum += partial[w][i];
    state[i] = sum;
  }
}

}  // namespace kelix::cuda
