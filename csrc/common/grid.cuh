// Kernels whose CTAs are all alive at once and wait for each other.
#pragma once

#include "common/device.cuh"

#ifdef KELIX_SIMT
#include "simt/grid.h"
#else

namespace kelix {

// Adds 1 and gives the value before. What the CTA wrote before its last barrier is seen by whoever
// acquires the sum.
__device__ __forceinline__ uint32_t add_release(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// kernel<<<grid, block, dynamic_shared, stream>>>(arguments...), which runs only where the whole
// grid fits at once; false where it does not (a stream may have a part of the device). A CUDA graph
// can hold it.
template <class... Parameters, class... Arguments>
bool launch_kernel_together(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t dynamic_shared, void* stream, const Arguments&... arguments) {
  allow_dynamic_shared(reinterpret_cast<const void*>(kernel), dynamic_shared);
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  const bool fits =
      cudaLaunchKernelEx(&config, kernel, arguments...) != cudaErrorCooperativeLaunchTooLarge;
  if (!fits) cudaGetLastError();  // it is dealt with
  return fits;
}

// The multiprocessors of the current device where each can hold a CTA of `kernel`, else 0.
template <class... Parameters>
unsigned ctas_together(void (*kernel)(Parameters...), int threads, size_t dynamic_shared) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (dynamic_shared > most_dynamic_shared(function)) return 0;
  if (device_attribute(cudaDevAttrCooperativeLaunch) == 0) return 0;
  allow_dynamic_shared(function, dynamic_shared);
  int per_multiprocessor = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, function, threads,
                                                dynamic_shared);
  if (per_multiprocessor == 0) return 0;
  return static_cast<unsigned>(num_multiprocessors());
}

inline void set_zero(void* memory, size_t bytes, void* stream) {
  cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}

}  // namespace kelix
#endif

namespace kelix {

// Called by all threads of all CTAs, which wait here for each other; what one wrote before, all can
// read behind it. The counter is zero when the kernel begins and only ever grows.
__device__ __forceinline__ void grid_barrier(uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = add_release(counter);
    const uint32_t all = before - before % gridDim.x + gridDim.x;
    if (before + 1 != all) {
      while (load_acquire(counter) < all) {
      }
    }
  }
  __syncthreads();
}

}  // namespace kelix
