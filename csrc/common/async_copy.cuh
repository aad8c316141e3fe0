// cp.async: copies from global to shared memory that run beside the arithmetic. A thread
// issues copies, commits them as a group, and waits for groups; a barrier shows them to the others.
#pragma once

#include "common/device.cuh"

#ifdef KELIX_SIMT
#include "simt/async_copy.h"
#else

namespace kelix {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Both addresses must be aligned to 16 bytes.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global));
}

// Copies `size` bytes, 0 to 16, and fills the rest with zeros.
__device__ __forceinline__ void copy_async_16_zero_fill(void* shared, const void* global,
                                                        uint32_t size) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(size));
}

// The same with 8 bytes, and addresses aligned to them.
__device__ __forceinline__ void copy_async_8_zero_fill(void* shared, const void* global,
                                                       uint32_t size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(size));
}

// Both addresses must be aligned to 4 bytes.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)),
               "l"(global));
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of this thread's latest groups are in flight.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace kelix
#endif
