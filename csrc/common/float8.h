// float8_e4m3fn: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinity, NaN where
// all bits but the sign are set. Largest 448, smallest normal 2^-6, smallest 2^-9. One source for
// the CPU kernels and for what the GPU has no instruction for; without branches, so that it
// vectorises.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace kelix {

struct float8 {
  uint8_t bits;
};

namespace {

[[maybe_unused]] KELIX_HOST_DEVICE inline float float_with_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Exact. NaN stays NaN.
[[maybe_unused]] KELIX_HOST_DEVICE inline float float_of_float8(float8 v) {
  const uint32_t code = v.bits;
  const uint32_t magnitude = code & 0x7fu;
  // As if normal: the exponent's bias becomes that of float32.
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // A subnormal is a multiple of 2^-9: what its mantissa adds to 2^-6. No float32 subnormal is
  // involved, which some modes count as zero and some processors take long for.
  const float subnormal = float_with_bits((magnitude << 20) + (121u << 23)) - 0x1p-6f;
  uint32_t bits;
  memcpy(&bits, &subnormal, 4);
  bits = magnitude < 8u ? bits : normal;
  bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
  return float_with_bits(bits | (code & 0x80u) << 24);
}

// Round to nearest even; beyond 448, infinity included, the nearest is 448. NaN stays NaN.
[[maybe_unused]] KELIX_HOST_DEVICE inline float8 float8_of_float(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t given = bits & 0x7fffffffu;
  const uint32_t magnitude = given < 0x43e00000u ? given : 0x43e00000u;  // 448
  const uint32_t rounded = (magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  // Floats from 2^14 to 2^15 are 2^-9 apart, so the sum is rounded to a subnormal's place.
  const float shifted = float_with_bits(magnitude) + 0x1p14f;
  uint32_t subnormal;
  memcpy(&subnormal, &shifted, 4);
  uint32_t code = magnitude < 0x3c800000u ? subnormal - 0x46800000u : rounded - (120u << 3);
  code = given > 0x7f800000u ? 0x7fu : code;
  return {static_cast<uint8_t>(code | sign)};
}

}  // namespace
}  // namespace kelix
