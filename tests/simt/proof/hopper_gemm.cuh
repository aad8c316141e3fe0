// C [64, 128] = A [rows, k] B [128, k]^T in bf16 by TMA and wgmma, missing rows and columns zero: a
// producer warp fills a ring of two stages that a warpgroup multiplies.
#pragma once

#include "common/hopper.cuh"

namespace kelix::proof {

enum class HopperBug {
  kNone,
  kNoFullWait,     // the products begin before the tiles have landed
  kNoEmptyWait,    // tiles land where products still read
  kNoProductWait,  // a stage is given back while its products run
  kTooManyBytes    // more are announced than come
};

inline constexpr int kHopperThreads = 128 + kWarpSize;
inline constexpr int kRing = 2;

struct HopperShared {
  bf16 a[kRing][64 * 64];
  bf16 b[kRing][128 * 64];
  SharedBarrier full[kRing];
  SharedBarrier empty[kRing];
};

template <HopperBug kBug>
__device__ void produce(const TensorMap& a, const TensorMap& b, int steps, HopperShared& shared) {
  constexpr uint32_t kBytes = sizeof shared.a[0] + sizeof shared.b[0];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kRing;
    if (kBug != HopperBug::kNoEmptyWait && step >= kRing) {
      barrier_wait(&shared.empty[stage], (step / kRing & 1) ^ 1);
    }
    barrier_arrive_expecting(&shared.full[stage],
                             kBytes + (kBug == HopperBug::kTooManyBytes ? 16 : 0));
    copy_tile(shared.a[stage], &a, &shared.full[stage], 0, step * 64);
    copy_tile(shared.b[stage], &b, &shared.full[stage], 0, step * 64);
  }
}

template <HopperBug kBug>
__global__ void __launch_bounds__(kHopperThreads)
    hopper_gemm_kernel(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
                       float* c, int steps) {
  KELIX_DYNAMIC_SHARED(HopperShared, memory);
  HopperShared& shared = *memory;
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (int stage = 0; stage < kRing; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 128);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (thread >= 128) {
    if (thread == 128) produce<kBug>(a, b, steps, shared);
    return;
  }
  float sums[64];
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kRing;
    if (kBug != HopperBug::kNoFullWait) barrier_wait(&shared.full[stage], step / kRing & 1);
    const uint64_t tile_a = tile_descriptor(shared.a[stage]);
    const uint64_t tile_b = tile_descriptor(shared.b[stage]);
    warpgroup_fence();
    for (int k = 0; k < 4; ++k) {
      warpgroup_mma<bf16>(sums, tile_a + 2 * k, tile_b + 2 * k, step + k > 0);
    }
    warpgroup_commit();
    if (kBug != HopperBug::kNoProductWait) warpgroup_wait<0>(sums);
    barrier_arrive(&shared.empty[stage]);
  }
  warpgroup_wait<0>(sums);
  for (int i = 0; i < 64; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    c[row * 128 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sums[i];
  }
}

}  // namespace kelix::proof
