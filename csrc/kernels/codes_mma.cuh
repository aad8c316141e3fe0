// Nearest codes by mma.sync (sm_80 and newer): a CTA keeps 128 tokens of one book in the registers
// of its four warps as fragments of A and streams the codes past them as B.
#pragma once

#include "common/tensor_core.cuh"
#include "kernels/codes_tile.cuh"

namespace kelix::cuda {

inline constexpr int kMmaThreads = 128;
inline constexpr int kMmaCtas = 3;  // per multiprocessor: one normalises while others multiply
inline constexpr int kMmaTokens = 128;
inline constexpr int kMmaCodes = 64;  // of a stage
inline constexpr int kMmaStages = 3;
inline constexpr int kMmaMaxDim = 128;  // what the registers hold
inline constexpr int kWarpTokens = 32;
inline constexpr int kWarpCodes = 32;  // multiplied before their scores are looked at
static_assert(kMmaTokens == kMmaThreads, "a thread normalises a token");

template <class T, int kDim>
struct CodesMmaShared {
  T codes[kMmaStages][kMmaCodes * kDim];  // first holds the tokens
  float norms[kMmaStages][kMmaCodes];
  float token_norms[kMmaTokens];  // reference only
};

// Starts the copies of one tile of codes and their norms; codes past the end are infinitely far.
template <class T, int kDim>
__device__ __forceinline__ void load_code_tile(const NearestCodesArgs& args, int64_t book,
                                               int64_t first_code, T* tile, float* norms) {
  const T* codebook = static_cast<const T*>(args.codebooks) + book * args.codes * args.dim;
  copy_rows<kMmaCodes, kDim, kMmaThreads>(codebook, first_code, args.codes, args.dim,
                                          static_cast<int>(args.dim), tile);
  const int64_t code = first_code + threadIdx.x;
  if (threadIdx.x < kMmaCodes) {
    if (code < args.codes) {
      copy_async_4(norms + threadIdx.x, args.norms + book * args.codes + code);
    } else {
      norms[threadIdx.x] = INFINITY;
    }
  }
}

// Fragments of A: 16 x 16 elements of the tile each, rows from 16 i, columns from 16 k.
template <int kSteps, class T>
__device__ __forceinline__ void load_token_fragments(const T* tile, int first_row,
                                                     uint32_t (&a)[2][kSteps][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      load_matrix_x4(a[i][k], tile + tile_offset<kMmaTokens>(first_row + i * 16 + lane % 16,
                                                             k * 2 + lane / 16));
    }
  }
}

// Products of a warp's 32 tokens and 32 codes of the tile.
template <int kSteps, class T>
__device__ __forceinline__ void multiply(const uint32_t (&a)[2][kSteps][4], const T* tile,
                                         int first_code, float (&dots)[2][4][4]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];  // two blocks of eight codes
      load_matrix_x4(
          b, tile + tile_offset<kMmaCodes>(first_code + pair * 16 + lane % 8 + lane / 16 * 8,
                                           k * 2 + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma<T>(dots[i][pair * 2], a[i][k], b[0], b[1]);
        mma<T>(dots[i][pair * 2 + 1], a[i][k], b[2], b[3]);
      }
    }
  }
}

// A thread's tokens: rows lane / 4 + 8 h of the 16 of fragment i.
template <class T, bool kReference>
struct WarpNearest {
  NearestCode<T, kReference> nearest[2][2];
  float token_norm[2][2];

  __device__ __forceinline__ void offer(const float (&dots)[2][4][4], const float* norms,
                                        int first_code) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float scores[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float norm = norms[j / 2 * 8 + column + j % 2];
          const float sum = kReference ? token_norm[i][h] + norm : norm;
          scores[j] = sum - 2.0f * dots[i][j / 2][h * 2 + j % 2];
        }
        nearest[i][h].offer(scores, [&](int j) { return first_code + j / 2 * 8 + column + j % 2; });
      }
    }
  }
};

// The tile of tokens, normalised, and their norms.
template <class T, int kDim, bool kReference>
__device__ __forceinline__ void prepare_tokens(const NearestCodesArgs& args, int64_t first_token,
                                               int64_t book, T* tile, float* token_norms) {
  const int dim = static_cast<int>(args.dim);
  copy_rows<kMmaTokens, kDim, kMmaThreads>(static_cast<const T*>(args.z) + book * dim, first_token,
                                           args.tokens, args.books * dim, dim, tile);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const int row = threadIdx.x;
  if (args.ln_weight != nullptr) norm_row<kMmaTokens>(args, book, row, tile);
  if (kReference) token_norms[row] = rounded_square<kMmaTokens>(tile, row, dim);
  __syncthreads();
}

template <class T, int kDim, bool kReference>
__global__ void __launch_bounds__(kMmaThreads, kMmaCtas)
    nearest_codes_mma_kernel(NearestCodesArgs args, CodesGrid grid) {
  KELIX_DYNAMIC_SHARED(unsigned char, memory);
  using Shared = CodesMmaShared<T, kDim>;
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kSteps = kDim / 16;
  // Neighbouring CTAs share their codes, for the L2 cache's sake.
  const int64_t first_token = static_cast<int64_t>(blockIdx.x % grid.token_tiles) * kMmaTokens;
  const int part = blockIdx.x / grid.token_tiles % grid.parts;
  const int64_t book = blockIdx.x / grid.token_tiles / grid.parts;
  const int lane = threadIdx.x % kWarpSize;
  const int warp_token = threadIdx.x / kWarpSize * kWarpTokens;

  T* tokens = shared.codes[0];
  prepare_tokens<T, kDim, kReference>(args, first_token, book, tokens, shared.token_norms);
  uint32_t a[2][kSteps][4];
  load_token_fragments(tokens, warp_token, a);
  WarpNearest<T, kReference> best;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    best.token_norm[row / 2][row % 2] = shared.token_norms[warp_token + row * 8 + lane / 4];
  }
  __syncthreads();  // codes may take the place of the tokens

  const int begin = static_cast<int>(static_cast<int64_t>(grid.code_tiles) * part / grid.parts);
  const int end = static_cast<int>(static_cast<int64_t>(grid.code_tiles) * (part + 1) / grid.parts);
  const auto load = [&](int tile) {
    const int stage = (tile - begin) % kMmaStages;
    if (tile < end) {
      load_code_tile<T, kDim>(args, book, static_cast<int64_t>(tile) * kMmaCodes,
                              shared.codes[stage], shared.norms[stage]);
    }
    copy_async_commit();
  };
  for (int i = 0; i < kMmaStages - 1; ++i) load(begin + i);
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<kMmaStages - 2>();
    __syncthreads();  // this tile has landed, and nobody reads the one before it any more
    load(tile + kMmaStages - 1);
    if (first_token + warp_token >= args.tokens) continue;  // a warp without tokens only copies
    const int stage = (tile - begin) % kMmaStages;
#pragma unroll
    for (int first = 0; first < kMmaCodes; first += kWarpCodes) {
      float dots[2][4][4] = {};
      multiply(a, shared.codes[stage], first, dots);
      best.offer(dots, shared.norms[stage] + first, tile * kMmaCodes + first);
    }
  }
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    store_nearest(args, grid, first_token + warp_token + row * 8 + lane / 4, book,
                  best.nearest[row / 2][row % 2].key());
  }
}

}  // namespace kelix::cuda
