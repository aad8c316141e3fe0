// C [m, n] = A [m, k] B [n, k]^T in bf16 on tensor cores, sizes multiples of the tile: the pattern
// of the project's matrix kernels (cp.async in two stages, ldmatrix, mma, swizzled shared memory).
#pragma once

#include "common/tensor_core.cuh"

namespace kelix::proof {

enum class GemmBug { kNone, kNoBarrier, kNoWait };

inline constexpr int kTile = 64;
inline constexpr int kGemmDepth = 32;
inline constexpr int kGemmThreads = 128;
inline constexpr size_t kGemmShared = 4 * kTile * kGemmDepth * sizeof(bf16);

// Element offset of a 16-byte chunk (0 to 3) of a row; neighbouring rows fall on other banks.
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kGemmDepth + ((chunk ^ (row >> 1 & 3)) << 3);
}

template <GemmBug kBug>
__global__ void __launch_bounds__(kGemmThreads)
    gemm_kernel(const bf16* a, const bf16* b, float* c, int n, int k) {
  KELIX_DYNAMIC_SHARED(bf16, shared);
  constexpr int kStage = kTile * kGemmDepth;
  bf16* tile_a[2] = {shared, shared + kStage};
  bf16* tile_b[2] = {shared + 2 * kStage, shared + 3 * kStage};
  const int thread = threadIdx.x;
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int row0 = blockIdx.y * kTile;
  const int column0 = blockIdx.x * kTile;
  const int warp_row = warp / 2 * 32;
  const int warp_column = warp % 2 * 32;

  const auto load = [&](int step, int stage) {
    for (int i = 0; i < 2; ++i) {
      const int row = thread / 4 + i * 32;
      const int chunk = thread % 4;
      const int64_t from = static_cast<int64_t>(step) * kGemmDepth + chunk * 8;
      copy_async_16(tile_a[stage] + chunk_offset(row, chunk),
                    a + static_cast<int64_t>(row0 + row) * k + from);
      copy_async_16(tile_b[stage] + chunk_offset(row, chunk),
                    b + static_cast<int64_t>(column0 + row) * k + from);
    }
    copy_async_commit();
  };

  float sums[2][4][4] = {};
  const int steps = k / kGemmDepth;
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    if (step + 1 < steps) {
      load(step + 1, stage ^ 1);
      copy_async_wait<kBug == GemmBug::kNoWait ? 2 : 1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    for (int half = 0; half < 2; ++half) {
      uint32_t fragment_a[2][4];
      uint32_t fragment_b[2][4];
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4(fragment_a[i], tile_a[stage] + chunk_offset(warp_row + i * 16 + lane % 16,
                                                                   half * 2 + lane / 16));
        load_matrix_x4(fragment_b[i],
                       tile_b[stage] + chunk_offset(warp_column + i * 16 + lane % 8 + lane / 16 * 8,
                                                    half * 2 + lane / 8 % 2));
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          mma_bf16(sums[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2],
                   fragment_b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    if (kBug != GemmBug::kNoBarrier) __syncthreads();  // the stage is read: it may be overwritten
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int e = 0; e < 4; ++e) {
        const int row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8;
        const int column = column0 + warp_column + j * 8 + lane % 4 * 2 + e % 2;
        c[static_cast<int64_t>(row) * n + column] = sums[i][j][e];
      }
    }
  }
}

}  // namespace kelix::proof
