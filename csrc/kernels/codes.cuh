// Nearest codes: a CTA takes 32 tokens of one book through all its codes, 128 at a time, as a
// float32 product in shared memory; every thread keeps the minimum of its own scores.
#pragma once

#include "common/codes.h"
#include "common/device.cuh"
#include "kernels/codes_tile.cuh"

namespace kelix::cuda {

inline constexpr int kCodesThreads = 256;
inline constexpr int kCodesWarps = kCodesThreads / kWarpSize;
inline constexpr int kTokenTile = 32;
inline constexpr int kCodeTile = 128;
inline constexpr int kDepth = 32;
inline constexpr int kPerThread = 4;  // tokens and codes of one thread
static_assert(kTokenTile == kCodesWarps * kPerThread && kCodeTile == kWarpSize * kPerThread);

// Rows padded to keep 16-byte alignment and spread the transposed stores over the banks.
struct CodesShared {
  float tokens[kDepth][kTokenTile + 4];
  float codes[kDepth][kCodeTile + 4];
  float mean[kTokenTile];
  float scale[kTokenTile];
  float norm[kTokenTile];  // |zn|^2, rounded
};

// Element i of the LayerNorm of one token, rounded to T.
template <class T>
__device__ __forceinline__ float normed_token(const NearestCodesArgs& args, const T* z,
                                              int64_t book, int64_t i, float mean, float scale) {
  if (args.ln_weight == nullptr) return to_float(z[i]);
  const float gain = to_float(static_cast<const T*>(args.ln_weight)[book * args.dim + i]);
  const float shift = to_float(static_cast<const T*>(args.ln_bias)[book * args.dim + i]);
  return round_to<T>((to_float(z[i]) - mean) * scale * gain + shift);
}

// Mean, 1 / deviation and |zn|^2 of the tile's tokens: a warp takes kPerThread of them.
template <class T>
__device__ void token_statistics(const NearestCodesArgs& args, int64_t first_token, int64_t book,
                                 CodesShared& shared) {
  const int lane = threadIdx.x % kWarpSize;
  for (int i = 0; i < kPerThread; ++i) {
    const int row = threadIdx.x / kWarpSize * kPerThread + i;
    if (first_token + row >= args.tokens) break;
    const T* z =
        static_cast<const T*>(args.z) + ((first_token + row) * args.books + book) * args.dim;
    float sum = 0;
    for (int64_t c = lane; c < args.dim; c += kWarpSize) sum += to_float(z[c]);
    const float mean = warp_sum(sum) / args.dim;
    float square_sum = 0;
    for (int64_t c = lane; c < args.dim; c += kWarpSize) {
      const float v = to_float(z[c]) - mean;
      square_sum += v * v;
    }
    const float scale = rsqrtf(warp_sum(square_sum) / args.dim + args.eps);
    float norm = 0;
    for (int64_t c = lane; c < args.dim; c += kWarpSize) {
      const float v = normed_token<T>(args, z, book, c, mean, scale);
      norm += round_to<T>(v * v);
    }
    norm = round_to<T>(warp_sum(norm));
    if (lane == 0) {
      shared.mean[row] = mean;
      shared.scale[row] = scale;
      shared.norm[row] = norm;
    }
  }
  __syncwarp();  // the loop over the depth, which waits for all, is empty where d is 0
}

// Columns [depth, depth + kDepth) of the tile's tokens and codes, transposed, zero outside.
template <class T>
__device__ void load_depth(const NearestCodesArgs& args, int64_t first_token, int64_t book,
                           int64_t first_code, int64_t depth, CodesShared& shared) {
  const int column = threadIdx.x % kDepth;
  const int64_t i = depth + column;
  for (int row = threadIdx.x / kDepth; row < kTokenTile; row += kCodesThreads / kDepth) {
    const int64_t token = first_token + row;
    float v = 0;
    if (token < args.tokens && i < args.dim) {
      const T* z = static_cast<const T*>(args.z) + (token * args.books + book) * args.dim;
      v = normed_token<T>(args, z, book, i, shared.mean[row], shared.scale[row]);
    }
    shared.tokens[column][row] = v;
  }
  const T* codebook = static_cast<const T*>(args.codebooks) + book * args.codes * args.dim;
  for (int row = threadIdx.x / kDepth; row < kCodeTile; row += kCodesThreads / kDepth) {
    const int64_t code = first_code + row;
    const bool inside = code < args.codes && i < args.dim;
    shared.codes[column][row] = inside ? to_float(codebook[code * args.dim + i]) : 0.0f;
  }
}

__device__ __forceinline__ float4 load4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}

// The distance that is compared: see NearestCodesArgs.
template <class T>
__device__ __forceinline__ float code_score(float dot, float code_norm, float token_norm,
                                            bool reference) {
  if (!reference) return code_norm - 2.0f * dot;
  return rounded_distance<T>(token_norm + code_norm - 2.0f * dot);
}

template <class T>
__global__ void __launch_bounds__(kCodesThreads) nearest_codes_kernel(NearestCodesArgs args) {
  KELIX_SHARED(CodesShared, shared);
  const int64_t book = blockIdx.x % args.books;
  const int64_t first_token = blockIdx.x / args.books * kTokenTile;
  const int lane = threadIdx.x % kWarpSize;
  const int my_token = threadIdx.x / kWarpSize * kPerThread;
  const int my_code = lane * kPerThread;
  const float* norms = args.norms + book * args.codes;

  token_statistics<T>(args, first_token, book, shared);
  float best[kPerThread];
  int index[kPerThread];
  for (int t = 0; t < kPerThread; ++t) {
    best[t] = INFINITY;
    index[t] = 0;
  }
  for (int64_t first_code = 0; first_code < args.codes; first_code += kCodeTile) {
    float dots[kPerThread][kPerThread] = {};
    for (int64_t depth = 0; depth < args.dim; depth += kDepth) {
      __syncthreads();  // the tiles of the turn before, and the statistics, are done
      load_depth<T>(args, first_token, book, first_code, depth, shared);
      __syncthreads();
#pragma unroll 8
      for (int k = 0; k < kDepth; ++k) {
        const float4 z = load4(&shared.tokens[k][my_token]);
        const float4 c = load4(&shared.codes[k][my_code]);
        const float zs[kPerThread] = {z.x, z.y, z.z, z.w};
        const float cs[kPerThread] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (int t = 0; t < kPerThread; ++t) {
#pragma unroll
          for (int j = 0; j < kPerThread; ++j) dots[t][j] += zs[t] * cs[j];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t code = first_code + my_code + j;
      if (code >= args.codes) break;
#pragma unroll
      for (int t = 0; t < kPerThread; ++t) {
        const float s =
            code_score<T>(dots[t][j], norms[code], shared.norm[my_token + t], args.reference);
        if (s < best[t]) {
          best[t] = s;
          index[t] = static_cast<int>(code);
        }
      }
    }
  }
  // The lanes of a warp share its tokens; the lowest index wins among equals.
#pragma unroll
  for (int t = 0; t < kPerThread; ++t) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      const float other = shuffle_xor(best[t], offset);
      const int other_index = shuffle_xor(index[t], offset);
      if (other < best[t] || (other == best[t] && other_index < index[t])) {
        best[t] = other;
        index[t] = other_index;
      }
    }
    const int64_t token = first_token + my_token + t;
    if (lane == 0 && token < args.tokens) args.indices[token * args.books + book] = index[t];
  }
}

inline constexpr int kMergeThreads = 256;

// Before the parts are merged: keys larger than all others.
__global__ void __launch_bounds__(kMergeThreads) clear_keys_kernel(NearestCodesArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i < args.tokens * args.books) args.indices[i] = -1;
}

// After it: the index is the lower half of the key.
__global__ void __launch_bounds__(kMergeThreads) unpack_keys_kernel(NearestCodesArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i < args.tokens * args.books) args.indices[i] &= 0xffffffff;
}

// One CTA per row. An id outside the table gives NaN: nothing on a GPU can raise.
template <class T>
__global__ void __launch_bounds__(kCodesThreads) block_embed_kernel(BlockEmbedArgs args) {
  const int64_t* ids = args.ids + static_cast<int64_t>(blockIdx.x) * args.slots;
  const T* table = static_cast<const T*>(args.table);
  T* y = static_cast<T*>(args.y) + static_cast<int64_t>(blockIdx.x) * args.cols;
  const bool text = ids[0] < args.text_vocab;
  for (int64_t c = threadIdx.x; c < args.cols; c += kCodesThreads) {
    float sum = 0;
    for (int64_t slot = 0; slot < args.slots - 1 && ids[slot] != args.block_end; ++slot) {
      const int64_t id = ids[text ? 0 : slot];
      sum += id >= 0 && id < args.vocab ? to_float(table[id * args.cols + c]) : NAN;
    }
    y[c] = from_float<T>(sum);
  }
}

}  // namespace kelix::cuda
