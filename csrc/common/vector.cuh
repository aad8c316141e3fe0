// Several neighbouring elements in one access of up to 16 bytes.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/device.cuh"

namespace kelix {

template <class T>
inline constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

// The integer type of one access.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2,
                       std::conditional_t<kBytes == 4, uint32_t,
                                          std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

template <class T, int kCount>
inline constexpr int kAccessBytes =
    kCount * static_cast<int>(sizeof(T)) < 16 ? kCount * static_cast<int>(sizeof(T)) : 16;

// kCount, a power of two, elements. `from` must be aligned to them, at most to 16 bytes.
template <class T, int kCount>
__device__ __forceinline__ void load_vector(const T* from, T (&to)[kCount]) {
  constexpr int kBytes = kAccessBytes<T, kCount>;
  constexpr int kStep = kBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    const auto raw = *reinterpret_cast<const Word<kBytes>*>(from + i);
    memcpy(to + i, &raw, kBytes);
  }
}

template <class T>
__device__ __forceinline__ void store_word(T* to, T value) {
  *to = value;
}

#ifndef KELIX_SIMT
// Left to itself the compiler may cut this store into four. `to` must be global memory.
__device__ __forceinline__ void store_word(uint4* to, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
#endif

// To global memory.
template <class T, int kCount>
__device__ __forceinline__ void store_vector(T* to, const T (&from)[kCount]) {
  constexpr int kBytes = kAccessBytes<T, kCount>;
  constexpr int kStep = kBytes / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    Word<kBytes> raw;
    memcpy(&raw, from + i, kBytes);
    store_word(reinterpret_cast<Word<kBytes>*>(to + i), raw);
  }
}

// The same with a conversion from and to float32.
template <class T, int kCount>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[kCount]) {
  T raw[kCount];
  load_vector(from, raw);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = to_float(raw[i]);
}

template <class T, int kCount>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[kCount]) {
  T raw[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) raw[i] = from_float<T>(from[i]);
  store_vector(to, raw);
}

__device__ __forceinline__ void widen(const int8_t* from, float (&to)[1]) { to[0] = *from; }

// Four values in registers, exactly. A conversion instruction has a quarter of the rate: here a
// byte, made unsigned, becomes the low bits of 2^23 as float32, and that is taken off again.
__device__ __forceinline__ void widen(const int8_t* from, float (&to)[4]) {
  uint32_t word;
  memcpy(&word, from, 4);
  const uint32_t shifted = word ^ 0x80808080u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = 0x4b000000u | ((shifted >> (8 * i)) & 0xffu);
    float value;
    memcpy(&value, &bits, 4);
    to[i] = value - 8388736.0f;  // 2^23 + 128
  }
}

// Whether all pointers, of which some may be null, are aligned to 16 bytes.
inline bool aligned_to_vectors(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

// Calls f with the width, as an integral_constant, that a kernel may read rows of `cols` elements
// with: vectors of 16 bytes where every row starts at a multiple of them, single elements
// elsewhere.
template <class T, class F>
void with_width(int64_t cols, std::initializer_list<const void*> pointers, const F& f) {
  if (cols % kVectorWidth<T> == 0 && aligned_to_vectors(pointers)) {
    f(std::integral_constant<int, kVectorWidth<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace kelix
