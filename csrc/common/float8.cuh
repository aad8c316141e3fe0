// float8 on the GPU: by instruction from sm_89 on, before by the arithmetic of 16-bit numbers.
#pragma once

#include "common/float8.h"
#include "common/tensor_core.cuh"

#if !defined(KELIX_SIMT) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define KELIX_HAS_FLOAT8_CONVERSION
#endif

namespace kelix {

// Two float8 in the low 16 bits of `pair` as two f16, exactly; NaN stays NaN.
__device__ __forceinline__ uint32_t f16_pair_of_float8(uint32_t pair) {
#ifdef KELIX_HAS_FLOAT8_CONVERSION
  uint32_t converted;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(converted) : "h"(static_cast<uint16_t>(pair)));
  return converted;
#else
  const uint32_t spread = (pair & 0xffu) << 8 | (pair & 0xff00u) << 16;
  const uint32_t magnitude = spread & 0x7f007f00u;
  // As bits of an f16 the exponent lacks 8: times 256, which is right for subnormals too.
  const uint32_t number =
      multiply_f16_pair((spread & 0x80008000u) | magnitude >> 1, /*256, 256*/ 0x5c005c00u);
  const uint32_t nan = (magnitude + 0x01000100u) & 0x80008000u;
  return number | (nan - (nan >> 6));
#endif
}

__device__ __forceinline__ float low_of_f16_pair(uint32_t pair) {
  const auto bits = static_cast<uint16_t>(pair);
  f16 value;
  memcpy(&value, &bits, sizeof(value));
  return to_float(value);
}

// The same as two elements of T.
template <class T>
__device__ __forceinline__ uint32_t pair_of_float8(uint32_t pair) {
  static_assert(sizeof(T) == 2);
  const uint32_t converted = f16_pair_of_float8(pair);
  if constexpr (std::is_same_v<T, f16>) {
    return converted;
  } else {
    return pack<T>(low_of_f16_pair(converted), low_of_f16_pair(converted >> 16));
  }
}

__device__ __forceinline__ float to_float(float8 v) {
  return low_of_f16_pair(f16_pair_of_float8(v.bits));
}

template <>
__device__ __forceinline__ float8 from_float<float8>(float v) {
#ifdef KELIX_HAS_FLOAT8_CONVERSION
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(v));
  return {static_cast<uint8_t>(pair)};
#else
  return float8_of_float(v);
#endif
}

}  // namespace kelix

#undef KELIX_HAS_FLOAT8_CONVERSION
