// The whole in-block loop of a small batch in one kernel whose CTAs stay resident, one per
// multiprocessor. A slot is a chain of linear maps; each is spread over all warps of the grid, two
// outputs per warp, and what stands before it (norm, attention) is small enough for every CTA to do
// it again for itself, into shared memory. So one barrier of the grid per linear map is all.
#pragma once

#include <type_traits>

#include "common/grid.cuh"
#include "kernels/block_decoder_stage.cuh"

namespace kelix::cuda {

// Of each row of the head that is read first: with 132 CTAs and bf16 17 MB, which the cache holds
// beside the decoder's weights.
inline constexpr int kPrefetchedLines = 32;

// The warp's first pair of outputs, and of the next the distance to it: neighbours go to different
// multiprocessors, so that few outputs still use all of them.
__device__ __forceinline__ int64_t first_pair() {
  return static_cast<int64_t>(threadIdx.x / kWarpSize) * gridDim.x + blockIdx.x;
}
__device__ __forceinline__ int64_t pair_stride() {
  return static_cast<int64_t>(kResidentWarps) * gridDim.x;
}

template <class W, int kRows, bool kWide>
__device__ __forceinline__ void apply_tile(const LinearArgs<W>& linear, bool gated,
                                           CachePolicy policy, const LivingRows& living,
                                           const float* tile) {
  const int lane = threadIdx.x % kWarpSize;
  const float* rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = tile + min(r, living.count - 1) * linear.in;
  const int64_t pairs = gated ? linear.out : (linear.out + 1) / 2;
  for (int64_t pair = first_pair(); pair < pairs; pair += pair_stride()) {
    const int64_t first = gated ? pair : 2 * pair;
    const int64_t second = gated ? linear.out + pair : min(2 * pair + 1, linear.out - 1);
    const W* const weights[2] = {linear.weight + first * linear.in,
                                 linear.weight + second * linear.in};
    float sums[2][kRows] = {};
    add_products<W, 2, kRows, kWide>(weights, rows, static_cast<int>(linear.in), policy, sums);
    // Lane r takes row r of the first output, lane kRows + r of the second.
    float value = 0, up = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float a = warp_sum(sums[0][r]), b = warp_sum(sums[1][r]);
      value = lane == r ? a : lane == kRows + r ? b : value;
      up = lane == r ? b : up;
    }
    const int r = lane % kRows;
    if (lane >= 2 * kRows || r >= living.count) continue;
    const int64_t row = living.row[r], output = lane < kRows ? first : second;
    if (gated) {
      if (lane < kRows) linear.y[row * linear.out + pair] = silu_mul(value, up);
    } else if (lane < kRows || second != first) {
      store_output(linear, row, output, value);
    }
  }
}

template <class W, int kRows>
__device__ __forceinline__ void apply_rows(const LinearArgs<W>& linear, bool gated,
                                           CachePolicy policy, const LivingRows& living,
                                           const float* tile) {
  if (takes_wide_loads(linear)) {
    apply_tile<W, kRows, true>(linear, gated, policy, living, tile);
  } else {
    apply_tile<W, kRows, false>(linear, gated, policy, living, tile);
  }
}

// The map with its weights taken as W. Only the head's are not T (they are int8), and it has no
// bias and adds nothing.
template <class W, class T>
__device__ __forceinline__ decltype(auto) with_weights(const LinearArgs<T>& linear) {
  if constexpr (std::is_same_v<W, T>) {
    return (linear);  // itself, no copy
  } else {
    LinearArgs<W> own{};
    own.weight = reinterpret_cast<const W*>(linear.weight);
    own.x = linear.x;
    own.y = linear.y;
    own.in = linear.in;
    own.out = linear.out;
    own.scale = linear.scale;
    return own;
  }
}

template <class W, class T>
__device__ __forceinline__ void apply_weights(const SlotStep<T>& step, const LivingRows& living) {
  KELIX_DYNAMIC_SHARED(float, tile);
  const LinearArgs<W>& linear = with_weights<W>(step.linear);
  const CachePolicy policy = step.weights_once ? cache_briefly() : cache_normally();
  if (living.count == 1) {
    apply_rows<W, 1>(linear, step.gated, policy, living, tile);
  } else if (living.count <= 4) {
    apply_rows<W, 4>(linear, step.gated, policy, living, tile);
  } else {
    apply_rows<W, kMaxResidentRows>(linear, step.gated, policy, living, tile);
  }
}

// Not inlined, so that the registers of the products and of the draws do not add up.
template <class T>
__device__ KELIX_NOINLINE void apply_linear(const SlotStep<T>& step, const LivingRows& living) {
  if (step.linear.scale == nullptr) {
    apply_weights<T>(step, living);
  } else {
    apply_weights<int8_t>(step, living);
  }
}

// The memory is idle while the decoder runs out of the cache: let it bring the start of the head's
// rows that the warp will read first.
template <class T>
__device__ __forceinline__ void prefetch_head(const BlockDecoderArgs& args, int64_t slot) {
  constexpr int kLanes = kWarpSize / 2;  // for each of the two rows
  const int64_t row_bytes = args.input_dim * head_element<T>(args);
  const HeadSlice slice = head_slice(args, slot);
  const int lane = threadIdx.x % kWarpSize;
  const int64_t output = 2 * first_pair() + lane / kLanes;
  if (output >= slice.width) return;
  const char* row = static_cast<const char*>(head_row<T>(args, slice.first + output));
  for (int line = lane % kLanes; line < kPrefetchedLines; line += kLanes) {
    if (line * kCacheLine < row_bytes) prefetch_line(row + line * kCacheLine);
  }
}

// All that a wide slot's draws need of the whole grid.
__device__ inline void survey_wide_rows(const BlockDecoderArgs& args, int64_t slot,
                                        const LivingRows& living, DrawShared& shared) {
  const int chunks = static_cast<int>(wide_chunks(head_slice(args, slot).width));
  const int units = living.count * chunks;
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t row = living.row[unit / chunks];
    const int chunk = unit % chunks;
    if (args.banned_id / kWideChunk == chunk) mask_banned_id(args, row, slot);
    summarise_chunk(wide_slot_row(args, row, slot), chunk, rule_of_slot(args, row, slot), shared);
  }
  grid_barrier(args.work.arrived);
  for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t row = living.row[unit / chunks];
    gather_chunk(wide_slot_row(args, row, slot), unit % chunks, rule_of_slot(args, row, slot),
                 shared);
  }
  grid_barrier(args.work.arrived);
}

__device__ inline Drawn draw_slot(const BlockDecoderArgs& args, int64_t row, int64_t slot,
                                  float* workspace, DrawShared& shared) {
  const int64_t width = head_slice(args, slot).width;
  const DrawRule rule = rule_of_slot(args, row, slot);
  if (is_wide(width)) return finish_wide_row(wide_slot_row(args, row, slot), rule, shared);
  mask_banned_id(args, row, slot);
  return draw_row(slot_logits(args, row, slot), width, rule, workspace, shared);
}

// Draws the living rows' ids into living.id. With draws_everywhere each CTA draws the only row for
// itself, all of them the same id; else a CTA draws a row, and a barrier tells the others. Not
// inlined for the same reason.
__device__ KELIX_NOINLINE static void draw_ids(const BlockDecoderArgs& args, int64_t slot,
                                               bool draws_everywhere, ResidentShared& shared,
                                               float* tile) {
  LivingRows& living = shared.living;
  const int64_t width = head_slice(args, slot).width, slots = args.num_codes + 1;
  if (is_wide(width)) survey_wide_rows(args, slot, living, shared.draw);
  const int first = draws_everywhere ? 0 : blockIdx.x;
  for (int r = first; r < living.count; r += gridDim.x) {
    const int64_t row = living.row[r];
    float* own = args.work.sampling + row * draw_workspace(width);
    const Drawn drawn = draw_slot(args, row, slot, draws_everywhere ? tile : own, shared.draw);
    if (!draws_everywhere || blockIdx.x == 0) store_slot(args, row, slot, drawn);
    if (threadIdx.x == 0) living.id[r] = drawn.id;
  }
  if (!draws_everywhere) {
    grid_barrier(args.work.arrived);
    const int r = threadIdx.x;
    if (r < living.count) living.id[r] = args.ids[living.row[r] * slots + slot];
  }
  __syncthreads();
}

// Drops the rows that are done.
__device__ inline void keep_living(const BlockDecoderArgs& args, int64_t slot, LivingRows& living) {
  if (threadIdx.x == 0) {
    int kept = 0;
    for (int r = 0; r < living.count; ++r) {
      if (is_done(args, slot, living.id[r])) continue;
      living.row[kept] = living.row[r];
      living.id[kept++] = living.id[r];
    }
    living.count = kept;
  }
  __syncthreads();
}

__device__ inline void begin_living(const BlockDecoderArgs& args, LivingRows& living) {
  if (threadIdx.x == 0) living.count = static_cast<int>(args.batch);
  if (threadIdx.x < kMaxResidentRows) {
    living.row[threadIdx.x] = threadIdx.x;
    living.id[threadIdx.x] = 0;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kResidentThreads)
    block_decode_kernel(const __grid_constant__ BlockDecoderArgs args, bool draws_everywhere) {
  KELIX_SHARED(ResidentShared, shared);
  KELIX_SHARED(SlotStep<T>, step);
  KELIX_DYNAMIC_SHARED(float, tile);
  begin_living(args, shared.living);
  for (int64_t slot = 0; slot < args.num_codes; ++slot) {
    prefetch_head<T>(args, slot);
    for (int64_t index = 0; index < steps_per_slot(args); ++index) {
      if (threadIdx.x == 0) step = slot_step<T>(args, slot, index);
      __syncthreads();
      stage(args, step, slot, shared, tile);
      apply_linear(step, shared.living);
      grid_barrier(args.work.arrived);
    }
    draw_ids(args, slot, draws_everywhere, shared, tile);
    keep_living(args, slot, shared.living);
    if (shared.living.count == 0) return;
  }
}

}  // namespace kelix::cuda
