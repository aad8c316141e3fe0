// Words to the L2 cache: what will be read soon, and what will not be read again.
#pragma once

#include "common/device.cuh"

#ifdef KELIX_SIMT
#include "simt/cache.h"
#else

namespace kelix {

using CachePolicy = uint64_t;

__device__ __forceinline__ CachePolicy cache_normally() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// What is read once goes first when room is needed.
__device__ __forceinline__ CachePolicy cache_briefly() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes of memory that no kernel writes meanwhile.
__device__ __forceinline__ uint4 load_raw_16_bytes(const void* from, CachePolicy policy) {
  uint4 raw;
  asm("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
      : "l"(from), "l"(policy));
  return raw;
}

// Asks for the cache line that holds `address`, without waiting for it.
__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

}  // namespace kelix
#endif

namespace kelix {

inline constexpr int kCacheLine = 128;

template <class T>
__device__ __forceinline__ void load_16_bytes(const T* from, CachePolicy policy,
                                              T (&to)[16 / sizeof(T)]) {
  const uint4 raw = load_raw_16_bytes(from, policy);
  memcpy(to, &raw, sizeof(raw));
}

}  // namespace kelix
