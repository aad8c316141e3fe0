// Nearest codes by wgmma and TMA (sm_90a): a CTA keeps up to 256 tokens of one book in shared
// memory. A producer warp streams the codes into a ring of stages; four warpgroups, 64 tokens each,
// multiply and look at their scores, one while the tensor cores work for another.
#pragma once

#include "common/hopper.cuh"
#include "kernels/codes_tile.cuh"

namespace kelix::cuda::codes_hopper {

inline constexpr int kGroupThreads = 128;
inline constexpr int kGroupTokens = 64;
inline constexpr int kGroups = 4;
inline constexpr int kTokens = kGroups * kGroupTokens;
inline constexpr int kCodes = 128;  // of a stage
inline constexpr int kConsumers = kGroups * kGroupThreads;
inline constexpr int kThreads = kConsumers + kWarpSize;
inline constexpr int kStages = 4;

template <class T, int kDim>
struct Shared {
  T codes[kStages][kCodes * kDim];
  T tokens[kTokens * kDim];
  float norms[kStages][kCodes];
  float token_norms[kTokens];  // reference only
  SharedBarrier full[kStages];
  SharedBarrier empty[kStages];
};

// Warps that multiply: those of warpgroups with tokens.
__device__ __forceinline__ int consumer_warps(const CtaWork& work) {
  const int tokens = static_cast<int>(work.end_token - work.first_token);
  return (tokens + kGroupTokens - 1) / kGroupTokens * (kGroupThreads / kWarpSize);
}

// By the producer warp, once the stage is empty: the codes by the TMA unit, the norms by hand, for
// they may start at any multiple of four bytes. Codes past the end are infinitely far.
template <class T, int kDim>
__device__ __forceinline__ void fill_stage(const NearestCodesArgs& args, const TensorMap& map,
                                           int64_t book, int tile, int stage,
                                           Shared<T, kDim>& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first_code = static_cast<int64_t>(tile) * kCodes;
  if (lane == 0) {
    barrier_arrive_expecting(&shared.full[stage], sizeof(shared.codes[stage]));
    for (int column = 0; column < kDim; column += kPanelColumns) {
      copy_tile(shared.codes[stage] + column * kCodes, &map, &shared.full[stage],
                static_cast<int>(book * args.codes + first_code), column);
    }
  }
  for (int i = lane; i < kCodes; i += kWarpSize) {
    const int64_t code = first_code + i;
    shared.norms[stage][i] = code < args.codes ? args.norms[book * args.codes + code] : INFINITY;
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(&shared.full[stage]);
}

// Products of a warpgroup's 64 tokens and the codes of a stage.
template <class T, int kDim>
__device__ __forceinline__ void multiply_stage(const T* tokens, const T* codes, float (&dots)[64]) {
  warpgroup_fence();
#pragma unroll
  for (int panel = 0; panel < kDim / kPanelColumns; ++panel) {
    const uint64_t a = tile_descriptor(tokens + panel * kPanelColumns * kTokens);
    const uint64_t b = tile_descriptor(codes + panel * kPanelColumns * kCodes);
#pragma unroll
    for (int k = 0; k < kPanelColumns / 16; ++k) {
      warpgroup_mma<T>(dots, a + 2 * k, b + 2 * k, panel + k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>(dots);
}

// A thread's two tokens: rows lane / 4 and 8 further of the 16 of its warp.
template <class T, bool kReference>
__device__ __forceinline__ void offer_stage(const float (&dots)[64], const float* norms,
                                            const float (&token_norm)[2], int first_code,
                                            NearestCode<T, kReference> (&nearest)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int first = 0; first < kCodes; first += 32) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float scores[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float norm = norms[first + j / 2 * 8 + column + j % 2];
        const float sum = kReference ? token_norm[h] + norm : norm;
        scores[j] = sum - 2.0f * dots[first / 2 + j / 2 * 4 + h * 2 + j % 2];
      }
      nearest[h].offer(scores,
                       [&](int j) { return first_code + first + j / 2 * 8 + column + j % 2; });
    }
  }
  nearest[0].share();
  nearest[1].share();
}

template <class T, int kDim, bool kReference>
__device__ __forceinline__ void consume(const NearestCodesArgs& args, const CodesGrid& grid,
                                        const CtaWork& work, Shared<T, kDim>& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = threadIdx.x / kWarpSize * 16 + lane / 4;
  const T* tokens = shared.tokens + threadIdx.x / kGroupThreads * kGroupTokens * kPanelColumns;
  const float token_norm[2] = {shared.token_norms[row], shared.token_norms[row + 8]};
  NearestCode<T, kReference> nearest[2];
  for (int tile = work.begin; tile < work.end; ++tile) {
    const int turn = tile - work.begin;
    const int stage = turn % kStages;
    barrier_wait(&shared.full[stage], turn / kStages & 1);
    float dots[64];
    multiply_stage<T, kDim>(tokens, shared.codes[stage], dots);
    offer_stage(dots, shared.norms[stage], token_norm, tile * kCodes, nearest);
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[stage]);
  }
  for (int h = 0; h < 2; ++h) {
    store_nearest(args, grid, work, row + h * 8, nearest[h].key());
  }
}

template <class T, int kDim, bool kReference>
__global__ void __launch_bounds__(kThreads, 1)
    nearest_codes_hopper_kernel(NearestCodesArgs args, CodesGrid grid,
                                const __grid_constant__ TensorMap map) {
  KELIX_DYNAMIC_SHARED(unsigned char, memory);
  auto& shared = *reinterpret_cast<Shared<T, kDim>*>(memory);
  const CtaWork work = work_of_cta(args, grid);
  const int warps = consumer_warps(work);
  const int warp = threadIdx.x / kWarpSize;
  const bool producer = warp == kConsumers / kWarpSize;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 2);
      barrier_init(&shared.empty[stage], warps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const auto fill = [&](int tile) {
    fill_stage(args, map, work.book, tile, (tile - work.begin) % kStages, shared);
  };
  const int filled = min(work.begin + kStages, work.end);
  if (producer) {  // on their way while the tokens are prepared
    for (int tile = work.begin; tile < filled; ++tile) fill(tile);
  }
  prepare_tokens<kTokens, kDim, kThreads, kReference>(args, work, shared.tokens,
                                                      shared.token_norms);
  fence_for_tensor_cores();
  __syncthreads();
  if (producer) {
    for (int tile = filled; tile < work.end; ++tile) {
      const int turn = tile - work.begin;
      barrier_wait(&shared.empty[turn % kStages], (turn / kStages & 1) ^ 1);
      fill(tile);
    }
  } else if (warp < warps) {
    consume<T, kDim, kReference>(args, grid, work, shared);
  }
}

}  // namespace kelix::cuda::codes_hopper
