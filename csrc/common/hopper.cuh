// What sm_90a adds: barriers in shared memory that count bytes, tile copies by the TMA unit, and
// matrix products of a warpgroup (128 threads) on tiles in shared memory. Only files that are
// compiled for sm_90a alone may include it.
#pragma once

#include <type_traits>

#include "common/async_copy.cuh"

#ifdef KELIX_SIMT
#include "simt/hopper.h"
#else
#include <cuda.h>

namespace kelix {

// A phase ends when all arrivals and all announced bytes have come; the next one begins at once.
struct SharedBarrier {
  uint64_t state;
};

__device__ __forceinline__ void barrier_init(SharedBarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last barrier_init, for the TMA unit's sake; a __syncthreads shows them to the threads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(SharedBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and the phase waits for `bytes` more.
__device__ __forceinline__ void barrier_arrive_expecting(SharedBarrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity is over; the phases count from 0.
__device__ __forceinline__ void barrier_wait(SharedBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

using TensorMap = CUtensorMap;

// Copies the box at (row, column) to `shared` (aligned to 1024 bytes); its bytes, those outside of
// the matrix included, which become zeros, count on the barrier.
__device__ __forceinline__ void copy_tile(void* shared, const TensorMap* map,
                                          SharedBarrier* barrier, int row, int column) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// Before a barrier, by threads whose stores to shared memory the tensor cores will read.
__device__ __forceinline__ void fence_for_tensor_cores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile for the products below: rows of 64 elements (128 bytes) swizzled as copy_tile does, from
// an address aligned to 1024 bytes. Adding 2 moves on by 16 columns.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return ((shared_address(tile) & 0x3ffff) >> 4) | kUnused | kEightRows | kSwizzle128;
}

// Before the first product that touches registers which the threads have touched.
__device__ __forceinline__ void warpgroup_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the latest groups run; only then may `results` be read, which the
// compiler learns by their passing through here.
template <int kPending, int kCount>
__device__ __forceinline__ void warpgroup_wait(float (&results)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(results[i])::"memory");
}

#define KELIX_FLOATS_8(d, i)                                                                  \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define KELIX_WGMMA_64X128(type)                                                                   \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred p;\n"                                                                            \
      "setp.ne.b32 p, %66, 0;\n"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                 \
      " "                                                                                          \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                    \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                           \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                           \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "                         \
      "%64, %65, p, 1, 1, 0, 0;\n"                                                                 \
      "}"                                                                                          \
      : KELIX_FLOATS_8(d, 0), KELIX_FLOATS_8(d, 8), KELIX_FLOATS_8(d, 16), KELIX_FLOATS_8(d, 24),  \
        KELIX_FLOATS_8(d, 32), KELIX_FLOATS_8(d, 40), KELIX_FLOATS_8(d, 48), KELIX_FLOATS_8(d, 56) \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// d = A B^T or d += A B^T: A is 64 x 16 and B 128 x 16, both tiles. Thread t has of d rows
// t / 32 * 16 + t % 32 / 4 and 8 further, columns 8 j + t % 4 * 2 and the next: d[4 j + 2 h + e].
// Runs beside the threads until warpgroup_wait.
template <class T>
__device__ __forceinline__ void warpgroup_mma(float (&d)[64], uint64_t a, uint64_t b,
                                              bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    KELIX_WGMMA_64X128("bf16");
  } else {
    KELIX_WGMMA_64X128("f16");
  }
}

#undef KELIX_WGMMA_64X128
#undef KELIX_FLOATS_8

// Describes a matrix of 16-bit elements to copy_tile, in boxes of box_rows rows and 64 columns.
// False when the driver refuses: a pointer not aligned to 16 bytes, cols not a multiple of 8.
template <class T>
bool make_tensor_map(TensorMap* map, const T* matrix, int64_t rows, int64_t cols, int box_rows) {
  // Through the runtime: a library linked against the driver would not load without one.
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                   &found);
  if (found != cudaDriverEntryPointSuccess) return false;
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(cols) * sizeof(T)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  return encode(map, kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                const_cast<T*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace kelix
#endif
