// Loads, stores and roundings of the storage types for the CPU kernels. Everything has internal
// linkage: an inline function with external linkage, built for AVX-512, could be chosen by the
// linker for all levels.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/float8.h"

namespace kelix {
namespace {

// float32 in one vector register.
#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

[[maybe_unused]] inline float to_float(float v) { return v; }
[[maybe_unused]] inline float to_float(int8_t v) { return v; }
[[maybe_unused]] inline float to_float(f16 v) { return static_cast<float>(v.value); }
[[maybe_unused]] inline float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

[[maybe_unused]] inline float to_float(float8 v) { return float_of_float8(v); }

template <class T>
inline T from_float(float v);
template <>
[[maybe_unused]] inline float8 from_float<float8>(float v) {
  return float8_of_float(v);
}
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

// x / ln 2 to the nearest integer, in the low bits of a float: adding 1.5 * 2^23 rounds.
inline constexpr float kRounding = 12582912.0f;
inline constexpr uint32_t kRoundingBits = 0x4b400000u;

// exp(x - n ln 2) for the n nearest to x / ln 2.
[[maybe_unused]] inline float exp_of_rest(float x, float n) {
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

// exp(x) that vectorises: |relative error| < 2e-7, 0 below -87.3, inf above 88.7, NaN kept.
[[maybe_unused]] inline float exp_simd(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.72f ? 88.72f : x);
  const float shifted = clamped * 1.44269504f + kRounding;
  const float p = exp_of_rest(clamped, shifted - kRounding);
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  // 2^n in two factors: n = 128 alone has no float32.
  const uint32_t half_bits = (((bits - kRoundingBits + 254u) >> 1) << 23);
  const uint32_t rest_bits = ((bits - kRoundingBits + 254u) << 23) - half_bits;
  float half, rest;
  std::memcpy(&half, &half_bits, 4);
  std::memcpy(&rest, &rest_bits, 4);
  const float y = p * half * rest;
  return x < -87.3f ? 0.0f : (x > 88.72f ? __builtin_inff() : (x == x ? y : x));
}

// x * sigmoid(x).
[[maybe_unused]] inline float silu_simd(float x) { return x / (1.0f + exp_simd(-x)); }

// 1 / (1 + exp(-x)) that vectorises, for gradients: flat beyond +-87, so that exp needs one factor
// for its power of two and no repair. The clamp is one of integers, which becomes a minimum and no
// branches. NaN gives a number; what it multiplies is NaN still.
[[maybe_unused]] inline float sigmoid_simd(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t size_bits = bits & 0x7fffffffu;
  const uint32_t clamped_bits = size_bits < 0x42ae0000u ? size_bits : 0x42ae0000u;
  float size;
  std::memcpy(&size, &clamped_bits, 4);
  const float shifted = size * -1.44269504f + kRounding;
  const float p = exp_of_rest(-size, shifted - kRounding);
  uint32_t scale_bits;
  std::memcpy(&scale_bits, &shifted, 4);
  scale_bits = (scale_bits - kRoundingBits + 127u) << 23;
  float scale;
  std::memcpy(&scale, &scale_bits, 4);
  const float small = p * scale;  // exp(-|x|)
  return (static_cast<int32_t>(bits) < 0 ? small : 1.0f) / (1.0f + small);
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
