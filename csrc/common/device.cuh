// The only file that knows CUDA intrinsics. Kernels call these wrappers, so that the same source
// can run elsewhere, and never see torch.
#pragma once

#ifdef KELIX_SIMT
#include "simt/cuda.h"  // tests/simt: the kernels run on a CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#ifndef KELIX_SIMT
// Shared memory of a CTA: KELIX_SHARED(float, tile, [8][33]);
#define KELIX_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

// A device function with registers of its own.
#define KELIX_NOINLINE __noinline__

// The part whose size the launch decides.
#define KELIX_DYNAMIC_SHARED(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char kelix_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(kelix_dynamic_shared)

namespace kelix {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// The most a launch of `kernel` on the current device may ask for.
inline size_t most_dynamic_shared(const void* kernel) {
  cudaFuncAttributes own{};
  cudaFuncGetAttributes(&own, kernel);
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - own.sharedSizeBytes;
}

// More than the default takes a word to the driver. The default is 48 KB together with the memory
// whose size the kernel fixes, which is below 8 KB in those that are launched with some of it. The
// limit belongs to the kernel, not to the launch, so it is always set to all there is: another
// thread, about to launch the same kernel, may need more than this one.
inline void allow_dynamic_shared(const void* kernel, size_t dynamic_shared) {
  constexpr size_t kDefaultLimit = 40 << 10;
  if (dynamic_shared <= kDefaultLimit) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(most_dynamic_shared(kernel)));
}

// kernel<<<grid, block, dynamic_shared, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared,
                   void* stream, const Arguments&... arguments) {
  allow_dynamic_shared(reinterpret_cast<const void*>(kernel), dynamic_shared);
  kernel<<<grid, block, dynamic_shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Of the current device: 10 major + minor.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// One instruction each, off by a few ulp; numbers below 2^-126 count as zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace kelix
#endif

namespace kelix {

using bf16 = __nv_bfloat16;
using f16 = __half;

inline constexpr int kWarpSize = 32;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(int8_t v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half_rn(v);
}

template <class T>
__device__ __forceinline__ float round_to(float v) {
  return to_float(from_float<T>(v));
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, shuffle_xor(value, offset));
  }
  return value;
}

// Sum over the CTA, the same value in every thread. `scratch` holds one float per warp.
__device__ __forceinline__ float cta_sum(float value, float* scratch) {
  value = warp_sum(value);
  __syncthreads();  // scratch may still be read from an earlier call
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += scratch[warp];
  return total;
}

// Any associative reduction over the CTA, the same value in every thread. `scratch` holds one value
// per warp.
template <class T, class Combine>
__device__ __forceinline__ T cta_reduce(T value, T* scratch, Combine combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, shuffle_xor(value, offset));
  }
  __syncthreads();  // scratch may still be read from an earlier call
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total = scratch[0];
  for (unsigned warp = 1; warp < blockDim.x / kWarpSize; ++warp) {
    total = combine(total, scratch[warp]);
  }
  return total;
}

// The value before the addition.
__device__ __forceinline__ int atomic_add(int* address, int value) {
  return atomicAdd(address, value);
}

__device__ __forceinline__ void atomic_min(uint64_t* address, uint64_t value) {
  static_assert(sizeof(uint64_t) == sizeof(unsigned long long));
  atomicMin(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }

// Two elements of 16 bits in one access, aligned to 4 bytes.
template <class T>
__device__ __forceinline__ uint32_t load_4_bytes(const T* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}
template <class T>
__device__ __forceinline__ void store_4_bytes(T* to, uint32_t pair) {
  *reinterpret_cast<uint32_t*>(to) = pair;
}

// 16 bytes in one load; `from` must be aligned to them.
template <class T>
__device__ __forceinline__ void load_16_bytes(const T* from, T (&to)[16 / sizeof(T)]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  memcpy(to, &raw, sizeof(raw));  // a store through a cast pointer would break aliasing rules
}

// 16 bytes in one store; `to` must be aligned to them.
template <class T>
__device__ __forceinline__ void store_16_bytes(T* to, const T (&from)[16 / sizeof(T)]) {
  uint4 raw;
  memcpy(&raw, from, sizeof(raw));
  *reinterpret_cast<uint4*>(to) = raw;
}

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      f(float{});
      break;
    case DType::kBFloat16:
      f(bf16{});
      break;
    case DType::kFloat16:
      f(f16{});
      break;
  }
}

// The last launch error as text, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace kelix
