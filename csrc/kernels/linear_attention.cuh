// Attention with ReLU features, in three passes: the scales of all rows, because a norm is over all
// heads; the state of every head, in pieces; the outputs. Here for every type and head size;
// the release's take the last two passes in linear_attention_{state,output}_bf16.cuh.
#pragma once

#include "common/diffusion.h"
#include "kernels/row.cuh"

namespace kelix::cuda {

inline constexpr int kLinearAttentionThreads = 256;
inline constexpr int kScaleRows = kLinearAttentionThreads / kWarpSize;  // of one CTA

// 1 / RMS of q and of k of every row, over all heads: a warp each.
template <class T, int kWidth>
__global__ void __launch_bounds__(kLinearAttentionThreads)
    linear_attention_scales_kernel(LinearAttentionArgs args) {
  const int64_t cols = args.heads * args.head_dim;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kScaleRows + threadIdx.x / kWarpSize;
  if (unit >= args.batch * args.tokens * 2) return;
  const T* x = static_cast<const T*>(args.qkv) + (unit / 2 * 3 + unit % 2) * cols;
  float square_sum = 0;
#pragma unroll 4
  for (int64_t c = threadIdx.x % kWarpSize * kWidth; c < cols; c += kWarpSize * kWidth) {
    float v[kWidth];
    load_floats(x + c, v);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) square_sum += v[i] * v[i];
  }
  square_sum = warp_sum(square_sum);
  if (threadIdx.x % kWarpSize == 0) args.scales[unit] = rsqrtf(square_sum / cols + args.norm_eps);
}

// RMSNorm and ReLU of one element of q or k.
template <class T>
__device__ __forceinline__ float feature(float v, float scale, float weight) {
  v = round_to<T>(round_to<T>(v * scale) * weight);
  return v < 0.0f ? 0.0f : v;  // not fmaxf: NaN must stay
}

inline constexpr int kTile = 32;  // tokens and channels of a shared tile
inline constexpr int kPerThread = kTile * kTile / kLinearAttentionThreads;
static_assert(kStatePad == kTile && kStateTokens % kTile == 0);

// Element (token, c) of q (part 0), k (1) or v (2) of a head: q and k normed and rectified; zero
// outside.
template <class T>
__device__ __forceinline__ float head_element(const LinearAttentionArgs& args, int part,
                                              int64_t batch, int64_t head, int64_t token,
                                              int64_t c) {
  if (token >= args.tokens || c >= args.head_dim) return 0.0f;
  const int64_t cols = args.heads * args.head_dim;
  const int64_t row = batch * args.tokens + token;
  const int64_t channel = head * args.head_dim + c;
  const float v = to_float(static_cast<const T*>(args.qkv)[(row * 3 + part) * cols + channel]);
  if (part == 2) return v;
  const T* weight = static_cast<const T*>(part == 0 ? args.q_norm : args.k_norm);
  if (weight == nullptr) return v < 0.0f ? 0.0f : v;
  return feature<T>(v, args.scales[row * 2 + part], to_float(weight[channel]));
}

template <class T>
__device__ void load_head_tile(const LinearAttentionArgs& args, int part, int64_t batch,
                               int64_t head, int64_t token, int64_t channel,
                               float (&tile)[kTile][kTile + 1]) {
  const int column = threadIdx.x % kTile;
  for (int row = threadIdx.x / kTile; row < kTile; row += kLinearAttentionThreads / kTile) {
    tile[row][column] = head_element<T>(args, part, batch, head, token + row, channel + column);
  }
}

// A CTA sums one kTile x kTile square of one head's state over one piece's tokens; the squares of
// the first column also sum the keys.
template <class T>
__global__ void __launch_bounds__(kLinearAttentionThreads)
    linear_attention_state_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, k, [kTile][kTile + 1]);
  KELIX_SHARED(float, v, [kTile][kTile + 1]);
  const int64_t stride = args.stride;
  const int64_t squares = stride / kTile;
  const int64_t place = blockIdx.x / (squares * squares);  // head, then piece
  const int64_t head = place / args.pieces;
  const int64_t row = blockIdx.x / squares % squares * kTile;
  const int64_t column = blockIdx.x % squares * kTile;
  const int64_t begin = place % args.pieces * kStateTokens;
  const int64_t end = min(begin + kStateTokens, args.tokens);
  const int j = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile * kPerThread;
  float sum[kPerThread] = {};
  float key_sum = 0;
  for (int64_t token = begin; token < end; token += kTile) {
    __syncthreads();  // the tiles of the turn before are read
    load_head_tile<T>(args, 1, head / args.heads, head % args.heads, token, row, k);
    load_head_tile<T>(args, 2, head / args.heads, head % args.heads, token, column, v);
    __syncthreads();
    for (int t = 0; t < kTile; ++t) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) sum[i] += k[t][first + i] * v[t][j];
      key_sum += k[t][j];
    }
  }
  float* state = args.states + place * args.state_floats;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    state[(row + first + i) * stride + column + j] = sum[i];
  }
  if (column == 0 && threadIdx.x < kTile) state[stride * stride + row + j] = key_sum;
}

// Element `at` of a head's state: the sum of its pieces, always in the same order.
__device__ __forceinline__ float state_element(const LinearAttentionArgs& args, int64_t head,
                                               int64_t at) {
  const float* state = args.states + head * args.pieces * args.state_floats + at;
  float sum = 0;
  for (int64_t piece = 0; piece < args.pieces; ++piece) sum += state[piece * args.state_floats];
  return sum;
}

// A CTA computes kTile tokens by kTile channels of one head.
template <class T>
__global__ void __launch_bounds__(kLinearAttentionThreads)
    linear_attention_output_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, q, [kTile][kTile + 1]);
  KELIX_SHARED(float, state_tile, [kTile][kTile + 1]);
  KELIX_SHARED(float, key_sum, [kTile]);
  const int64_t stride = args.stride;
  const int64_t squares = stride / kTile;
  const int64_t tiles = ceil_div(args.tokens, kTile);
  const int64_t column = blockIdx.x % squares * kTile;
  const int64_t token = blockIdx.x / squares % tiles * kTile;
  const int64_t head = blockIdx.x / squares / tiles;
  const int64_t batch = head / args.heads;
  const int j = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile * kPerThread;
  float sum[kPerThread] = {};
  float weight[kPerThread] = {};
  for (int64_t channel = 0; channel < stride; channel += kTile) {
    __syncthreads();  // the tiles of the turn before are read
    load_head_tile<T>(args, 0, batch, head % args.heads, token, channel, q);
    for (int i = threadIdx.x / kTile; i < kTile; i += kLinearAttentionThreads / kTile) {
      state_tile[i][j] = state_element(args, head, (channel + i) * stride + column + j);
    }
    if (threadIdx.x < kTile) key_sum[j] = state_element(args, head, stride * stride + channel + j);
    __syncthreads();
    for (int i = 0; i < kTile; ++i) {
#pragma unroll
      for (int t = 0; t < kPerThread; ++t) {
        sum[t] += q[first + t][i] * state_tile[i][j];
        weight[t] += q[first + t][i] * key_sum[i];
      }
    }
  }
  if (column + j >= args.head_dim) return;
#pragma unroll
  for (int t = 0; t < kPerThread; ++t) {
    if (token + first + t >= args.tokens) break;
    const int64_t row = batch * args.tokens + token + first + t;
    static_cast<T*>(args.y)[(row * args.heads + head % args.heads) * args.head_dim + column + j] =
        from_float<T>(sum[t] / (weight[t] + args.eps));
  }
}

}  // namespace kelix::cuda
