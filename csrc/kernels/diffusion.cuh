// The elementwise work of a SANA block, attention with ReLU features and the gated depthwise
// convolution.
#pragma once

#include "common/device.cuh"
#include "common/diffusion.h"

namespace kelix::cuda {

inline constexpr int kDiffusionThreads = 256;
inline constexpr int kDiffusionWarps = kDiffusionThreads / kWarpSize;

// One CTA per row.
template <class T>
__global__ void __launch_bounds__(kDiffusionThreads) modulate_kernel(ModulateArgs args) {
  KELIX_SHARED(float, scratch, [kDiffusionWarps]);
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.x) + row * args.cols;
  const T* shift = static_cast<const T*>(args.shift) + row / args.tokens * args.cols;
  const T* scale = static_cast<const T*>(args.scale) + row / args.tokens * args.cols;
  T* y = static_cast<T*>(args.y) + row * args.cols;
  float sum = 0;
  for (int64_t c = threadIdx.x; c < args.cols; c += kDiffusionThreads) sum += to_float(x[c]);
  const float mean = cta_sum(sum, scratch) / args.cols;
  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < args.cols; c += kDiffusionThreads) {
    const float v = to_float(x[c]) - mean;
    square_sum += v * v;
  }
  const float inv_deviation = rsqrtf(cta_sum(square_sum, scratch) / args.cols + args.eps);
  for (int64_t c = threadIdx.x; c < args.cols; c += kDiffusionThreads) {
    const float normed = (to_float(x[c]) - mean) * inv_deviation;
    y[c] = from_float<T>(normed * (1.0f + to_float(scale[c])) + to_float(shift[c]));
  }
}

// Index of this thread in a grid-stride loop, and the stride.
__device__ __forceinline__ int64_t grid_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t grid_stride() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <class T>
__global__ void __launch_bounds__(kDiffusionThreads) gated_residual_kernel(GatedResidualArgs args) {
  T* x = static_cast<T*>(args.x);
  const T* y = static_cast<const T*>(args.y);
  const T* gate = static_cast<const T*>(args.gate);
  const int64_t total = args.batch * args.tokens * args.cols;
  for (int64_t i = grid_index(); i < total; i += grid_stride()) {
    const int64_t batch = i / (args.tokens * args.cols);
    const float g = to_float(gate[batch * args.cols + i % args.cols]);
    x[i] = from_float<T>(to_float(x[i]) + g * to_float(y[i]));
  }
}

template <class T>
__global__ void __launch_bounds__(kDiffusionThreads) euler_step_kernel(EulerStepArgs args) {
  const T* velocity = static_cast<const T*>(args.velocity);
  const T* uncond = static_cast<const T*>(args.uncond);
  const int64_t total = args.batch * args.cols;
  for (int64_t i = grid_index(); i < total; i += grid_stride()) {
    const int64_t row = i / args.cols;
    float v = to_float(velocity[i]);
    if (uncond != nullptr) {
      const float base = to_float(uncond[i]);
      v = base + args.guidance[row] * (v - base);
    }
    args.latent[i] += args.dt[row] * v;
  }
}

// 1 / RMS of q (even CTAs) and k (odd CTAs) of one row, over all heads.
template <class T>
__global__ void __launch_bounds__(kDiffusionThreads)
    linear_attention_scales_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, scratch, [kDiffusionWarps]);
  const int64_t cols = args.heads * args.head_dim;
  const int64_t row = blockIdx.x / 2;
  const int part = blockIdx.x % 2;
  const T* x = static_cast<const T*>(args.qkv) + (row * 3 + part) * cols;
  float square_sum = 0;
  for (int64_t c = threadIdx.x; c < cols; c += kDiffusionThreads) {
    const float v = to_float(x[c]);
    square_sum += v * v;
  }
  square_sum = cta_sum(square_sum, scratch);
  if (threadIdx.x == 0) args.scales[row * 2 + part] = rsqrtf(square_sum / cols + args.norm_eps);
}

inline constexpr int kTile = 32;  // tokens and channels of a shared tile
inline constexpr int kPerThread = kTile * kTile / kDiffusionThreads;
static_assert(kStatePad == kTile);

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
  float v = to_float(static_cast<const T*>(args.qkv)[(row * 3 + part) * cols + channel]);
  if (part == 2) return v;
  const T* weight = static_cast<const T*>(part == 0 ? args.q_norm : args.k_norm);
  if (weight != nullptr) {
    v = round_to<T>(round_to<T>(v * args.scales[row * 2 + part]) * to_float(weight[channel]));
  }
  return v < 0.0f ? 0.0f : v;  // not fmaxf: NaN must stay
}

template <class T>
__device__ void load_head_tile(const LinearAttentionArgs& args, int part, int64_t batch,
                               int64_t head, int64_t token, int64_t channel,
                               float (&tile)[kTile][kTile + 1]) {
  const int column = threadIdx.x % kTile;
  for (int row = threadIdx.x / kTile; row < kTile; row += kDiffusionThreads / kTile) {
    tile[row][column] = head_element<T>(args, part, batch, head, token + row, channel + column);
  }
}

// A CTA sums one kTile x kTile piece of one head's state over all tokens; the pieces of the first
// column also sum the keys.
template <class T>
__global__ void __launch_bounds__(kDiffusionThreads)
    linear_attention_state_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, k, [kTile][kTile + 1]);
  KELIX_SHARED(float, v, [kTile][kTile + 1]);
  const int64_t stride = args.stride;
  const int64_t pieces = stride / kTile;
  const int64_t head = blockIdx.x / (pieces * pieces);
  const int64_t row = blockIdx.x / pieces % pieces * kTile;
  const int64_t column = blockIdx.x % pieces * kTile;
  const int j = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile * kPerThread;
  float sum[kPerThread] = {};
  float key_sum = 0;
  for (int64_t token = 0; token < args.tokens; token += kTile) {
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
  float* state = args.states + head * args.state_floats;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    state[(row + first + i) * stride + column + j] = sum[i];
  }
  if (column == 0 && threadIdx.x < kTile) state[stride * stride + row + j] = key_sum;
}

// A CTA computes kTile tokens by kTile channels of one head.
template <class T>
__global__ void __launch_bounds__(kDiffusionThreads)
    linear_attention_output_kernel(LinearAttentionArgs args) {
  KELIX_SHARED(float, q, [kTile][kTile + 1]);
  KELIX_SHARED(float, state_tile, [kTile][kTile + 1]);
  KELIX_SHARED(float, key_sum, [kTile]);
  const int64_t stride = args.stride;
  const int64_t pieces = stride / kTile;
  const int64_t tiles = (args.tokens + kTile - 1) / kTile;
  const int64_t column = blockIdx.x % pieces * kTile;
  const int64_t token = blockIdx.x / pieces % tiles * kTile;
  const int64_t head = blockIdx.x / pieces / tiles;
  const int64_t batch = head / args.heads;
  const float* state = args.states + head * args.state_floats;
  const int j = threadIdx.x % kTile;
  const int first = threadIdx.x / kTile * kPerThread;
  float sum[kPerThread] = {};
  float weight[kPerThread] = {};
  for (int64_t channel = 0; channel < stride; channel += kTile) {
    __syncthreads();  // the tiles of the turn before are read
    load_head_tile<T>(args, 0, batch, head % args.heads, token, channel, q);
    for (int i = threadIdx.x / kTile; i < kTile; i += kDiffusionThreads / kTile) {
      state_tile[i][j] = state[(channel + i) * stride + column + j];
    }
    if (threadIdx.x < kTile) key_sum[j] = state[stride * stride + channel + j];
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

__device__ __forceinline__ float activate(Activation activation, float x) {
  if (activation == Activation::kSilu) return x / (1.0f + expf(-x));
  if (activation == Activation::kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  return x;
}

inline constexpr int kStrip = 8;  // output rows of one thread
inline constexpr int kTaps = 9;

// Activated pixels (h, w - 1 .. w + 1) of one channel, zero outside the image.
template <class T>
__device__ __forceinline__ void load_pixels(const DepthwiseGluArgs& args, int64_t image, int64_t h,
                                            int64_t w, int64_t channel, float* pixels) {
  for (int i = 0; i < 3; ++i) {
    const int64_t x = w + i - 1;
    const bool inside = h >= 0 && h < args.height && x >= 0 && x < args.width;
    const int64_t at = ((image * args.height + h) * args.width + x) * 2 * args.channels + channel;
    pixels[i] = inside ? activate(args.pre_act, to_float(static_cast<const T*>(args.x)[at])) : 0.0f;
  }
}

// One thread per channel pair, column and strip of rows; a 3x3 window of both halves slides down
// in registers, so that each row is activated three times, for its three columns, and not nine.
template <class T>
__global__ void __launch_bounds__(kDiffusionThreads) depthwise_glu_kernel(DepthwiseGluArgs args) {
  const int64_t strips = (args.height + kStrip - 1) / kStrip;
  const int64_t index = grid_index();
  const int64_t m = index % args.channels;
  const int64_t w = index / args.channels % args.width;
  const int64_t top = index / args.channels / args.width % strips * kStrip;
  const int64_t image = index / args.channels / args.width / strips;
  if (image >= args.batch) return;
  float taps[2][kTaps];
  float bias[2];
  float window[2][kTaps];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t channel = half * args.channels + m;
    for (int i = 0; i < kTaps; ++i) {
      taps[half][i] = to_float(static_cast<const T*>(args.weight)[channel * kTaps + i]);
    }
    bias[half] = to_float(static_cast<const T*>(args.bias)[channel]);
    load_pixels<T>(args, image, top - 1, w, channel, window[half] + 3);
    load_pixels<T>(args, image, top, w, channel, window[half] + 6);
  }
  for (int64_t h = top; h < top + kStrip && h < args.height; ++h) {
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 6; ++i) window[half][i] = window[half][i + 3];
      load_pixels<T>(args, image, h + 1, w, half * args.channels + m, window[half] + 6);
      sum[half] = bias[half];
#pragma unroll
      for (int i = 0; i < kTaps; ++i) sum[half] += taps[half][i] * window[half][i];
    }
    static_cast<T*>(args.y)[((image * args.height + h) * args.width + w) * args.channels + m] =
        from_float<T>(sum[0] * activate(args.gate_act, sum[1]));
  }
}

}  // namespace kelix::cuda
