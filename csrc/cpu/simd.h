// Loads, stores and roundings of the storage types for the CPU kernels. Everything has internal
// linkage: an inline function with external linkage, built for AVX-512, could be chosen by the
// linker for all levels.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace kelix {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

[[maybe_unused]] inline float to_float(float v) { return v; }
[[maybe_unused]] inline float to_float(f16 v) { return static_cast<float>(v.value); }
[[maybe_unused]] inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T>
inline T from_float(float v);
template <>
[[maybe_unused]] inline float from_float<float>(float v) {
  return v;
}
template <>
[[maybe_unused]] inline f16 from_float<f16>(float v) {
  return {static_cast<_Float16>(v)};
}
// Round to nearest even; NaN stays NaN.
template <>
[[maybe_unused]] inline bf16 from_float<bf16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <class T>
inline float round_to(float v) {
  return to_float(from_float<T>(v));
}

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
inline void with_dtype(DType dtype, const F& f) {
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

}  // namespace
}  // namespace kelix
