// Nearest codes by mma.sync (sm_80 and newer): a CTA keeps 128 tokens of one book in the registers
// of its four warps as fragments of A and streams the codes past them as B.
#pragma once

#include "common/tensor_core.cuh"
#include "kernels/codes_tile.cuh"

namespace kelix::cuda::codes_mma {

inline constexpr int kThreads = 128;
inline constexpr int kCtas = 3;  // per multiprocessor: one normalises while others multiply
inline constexpr int kTokens = 128;
inline constexpr int kCodes = 64;  // of a stage
inline constexpr int kStages = 3;
inline constexpr int kMaxDim = 128;  // what the registers hold
inline constexpr int kWarpTokens = 32;
inline constexpr int kWarpCodes = 32;  // multiplied before their scores are looked at
static_assert(kTokens == kThreads, "a thread normalises a token");

template <class T, int kDim>
struct Shared {
  T codes[kStages][kCodes * kDim];  // first holds the tokens
  float norms[kStages][kCodes];
  float token_norms[kTokens];  // reference only
};

// Starts the copies of one tile of codes and their norms; codes past the end are infinitely far.
template <class T, int kDim>
__device__ __forceinline__ void load_code_tile(const NearestCodesArgs& args, int64_t book,
                                               int64_t first_code, T* tile, float* norms) {
  const T* codebook = static_cast<const T*>(args.codebooks) + book * args.codes * args.dim;
  copy_rows<kCodes, kDim, kThreads>(codebook, first_code, args.codes, args.dim,
                                    static_cast<int>(args.dim), tile);
  const int64_t code = first_code + threadIdx.x;
  if (threadIdx.x < kCodes) {
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
      load_matrix_x4(
          a[i][k], tile + tile_offset<kTokens>(first_row + i * 16 + lane % 16, k * 2 + lane / 16));
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
      load_matrix_x4(b,
                     tile + tile_offset<kCodes>(first_code + pair * 16 + lane % 8 + lane / 16 * 8,
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

template <class T, int kDim, bool kReference>
__global__ void __launch_bounds__(kThreads, kCtas)
    nearest_codes_mma_kernel(NearestCodesArgs args, CodesGrid grid) {
  KELIX_DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(memory);
  constexpr int kSteps = kDim / 16;
  const CtaWork work = work_of_cta(args, grid);
  const int lane = threadIdx.x % kWarpSize;
  const int warp_token = threadIdx.x / kWarpSize * kWarpTokens;
  const int my_row = warp_token + lane / 4;  // and 8, 16, 24 further

  T* tokens = shared.codes[0];
  prepare_tokens<kTokens, kDim, kThreads, kReference>(args, work, tokens, shared.token_norms);
  __syncthreads();
  uint32_t a[2][kSteps][4];
  load_token_fragments(tokens, warp_token, a);
  WarpNearest<T, kReference> best;
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    best.token_norm[row / 2][row % 2] = shared.token_norms[my_row + row * 8];
  }
  __syncthreads();  // codes may take the place of the tokens

  const auto load = [&](int tile) {
    const int stage = (tile - work.begin) % kStages;
    if (tile < work.end) {
      load_code_tile<T, kDim>(args, work.book, static_cast<int64_t>(tile) * kCodes,
                              shared.codes[stage], shared.norms[stage]);
    }
    copy_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) load(work.begin + i);
  for (int tile = work.begin; tile < work.end; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // this tile has landed, and nobody reads the one before it any more
    load(tile + kStages - 1);
    if (work.first_token + warp_token >= work.end_token)
      continue;  // a warp without tokens only copies
    const int stage = (tile - work.begin) % kStages;
#pragma unroll
    for (int first = 0; first < kCodes; first += kWarpCodes) {
      float dots[2][4][4] = {};
      multiply(a, shared.codes[stage], first, dots);
      best.offer(dots, shared.norms[stage] + first, tile * kCodes + first);
    }
    for (auto& rows : best.nearest) {
      for (auto& row : rows) row.share();
    }
  }
#pragma unroll
  for (int row = 0; row < 4; ++row) {
    store_nearest(args, grid, work, my_row + row * 8, best.nearest[row / 2][row % 2].key());
  }
}

}  // namespace kelix::cuda::codes_mma
