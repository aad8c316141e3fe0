// Small kernels, each right with kBug false and wrong in one way with kBug true.
#pragma once

#include "common/async_copy.cuh"
#include "common/device.cuh"
#include "common/grid.cuh"

namespace kelix::proof {

// out[i] = in[n - 1 - i] through shared memory; the bug: no barrier before the read.
template <bool kBug>
__global__ void reverse_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [128]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kBug) __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// A rotating buffer: each round every thread reads its neighbour's value, adds its own and stores
// it. The bug: no barrier between the reads of a round and the writes of the next.
template <bool kBug>
__global__ void rotate_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [128]);
  float value = in[threadIdx.x];
  for (int round = 0; round < 8; ++round) {
    tile[threadIdx.x] = value;
    __syncthreads();
    value = tile[(threadIdx.x + 1) % blockDim.x] + 1;
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = value;
}

// out = in through cp.async; the bug: the second group is not waited for.
template <bool kBug>
__global__ void copy_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [2][128]);
  copy_async_16(&tile[0][4 * threadIdx.x], in + 4 * threadIdx.x);
  copy_async_commit();
  copy_async_16_zero_fill(&tile[1][4 * threadIdx.x], in + 128 + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<kBug ? 1 : 0>();
  __syncthreads();
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) out[i] = tile[i / 128][i % 128];
}

// out = in through copies of 4 bytes; the bug: they are committed after the wait for them.
template <bool kBug>
__global__ void narrow_copy_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [128]);
  copy_async_4(&tile[threadIdx.x], in + threadIdx.x);
  if (!kBug) copy_async_commit();
  copy_async_wait<0>();
  if (kBug) copy_async_commit();
  __syncthreads();
  out[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

// Sums within each half of a warp. The bug: the halves take part in one collective each at another
// place, although both name all 32 lanes.
template <bool kBug>
__global__ void half_sums_kernel(const float* in, float* out) {
  const float value = in[threadIdx.x];
  if (kBug) {
    if (threadIdx.x % kWarpSize < 16) {
      out[threadIdx.x] = warp_sum(value);
    } else {
      out[threadIdx.x] = warp_sum(value * 2);
    }
  } else {
    float sum = value;
    for (int offset = 8; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
    out[threadIdx.x] = sum;
  }
}

// The bug: half of the threads skip a barrier and meet the others at the next one.
template <bool kBug>
__global__ void split_barrier_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [128]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kBug || threadIdx.x < 64) __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
  __syncthreads();
}

// The bug: half of a warp waits in a shuffle for lanes that wait at the barrier.
template <bool kBug>
__global__ void deadlock_kernel(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (!kBug || threadIdx.x < 16) value = warp_max(value);
  __syncthreads();
  out[threadIdx.x] = value;
}

// The bug: a lane reads from one that the mask leaves out.
template <bool kBug>
__global__ void absent_lane_kernel(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % kWarpSize < 16) {
    value = __shfl_xor_sync(0xffffu, value, kBug ? 16 : 8);
  }
  out[threadIdx.x] = value;
}

// The bug: lanes take part in a vote that does not name them.
template <bool kBug>
__global__ void masked_out_kernel(const float* in, float* out) {
  const float value = in[threadIdx.x];
  const bool any = __any_sync(kBug ? 0xffffu : 0xffffffffu, value > 1e6f);
  out[threadIdx.x] = any ? 0 : value;
}

// The bug: the last thread writes past its shared array.
template <bool kBug>
__global__ void shared_overrun_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [128]);
  float* into = tile;  // past a pointer, the bounds of the array are unknown
  into[threadIdx.x + (kBug ? 1 : 0)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

// The bug: the last thread reads past its input.
template <bool kBug>
__global__ void global_overrun_kernel(const float* in, float* out) {
  const float value = in[threadIdx.x + (kBug ? 1 : 0)];
  __syncthreads();
  out[threadIdx.x] = value;
}

// The bug: a column index one too large lands in the next row, which only the bounds of the array
// tell.
template <bool kBug>
__global__ void row_overrun_kernel(const float* in, float* out) {
  KELIX_SHARED(float, tile, [4][32]);
  tile[threadIdx.x / 32][threadIdx.x % 32] = in[threadIdx.x];
  __syncthreads();
  const unsigned column = threadIdx.x % 32 + (kBug && threadIdx.x == 31 ? 1 : 0);
  out[threadIdx.x] = tile[threadIdx.x / 32][column];
}

// The bug: a 16-byte load from an address that is not a multiple of 16.
template <bool kBug>
__global__ void misaligned_kernel(const float* in, float* out) {
  if (threadIdx.x % 4 != 0) return;
  const float* from = in + threadIdx.x + (kBug ? 1 : 0);
  *reinterpret_cast<float4*>(out + threadIdx.x) = *reinterpret_cast<const float4*>(from);
}

// Every CTA waits for all others. The bug: it is launched as if they did not.
template <bool kBug>
__global__ void grid_barrier_kernel(const float* in, float* out, unsigned* arrived) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(20);
  }
  __syncthreads();
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  float* mine = out + (gridDim.x + blockIdx.x) * blockDim.x;
  mine[threadIdx.x] = out[next * blockDim.x + threadIdx.x] + 1;
}

// Each round a CTA adds 1 to what its neighbour had in the round before. The bug: no barrier of the
// grid between the rounds.
template <bool kBug>
__global__ void grid_rounds_kernel(const float* in, float* out, uint32_t* arrived) {
  const unsigned size = gridDim.x * blockDim.x;
  const unsigned mine = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned next = (mine + blockDim.x) % size;
  out[mine] = in[threadIdx.x];
  for (unsigned round = 1; round <= 4; ++round) {
    if (!kBug) grid_barrier(arrived);
    out[round * size + mine] = out[(round - 1) * size + next] + 1;
  }
}

}  // namespace kelix::proof
