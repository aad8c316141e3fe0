// Philox4x32-10 (Salmon et al. 2011): random words as a pure function of a counter and a key, one
// source for the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace kelix {
namespace {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

// counter: 128 bits, lowest word first. key: 64 bits, lowest word first.
[[maybe_unused]] KELIX_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords counter,
                                                                    uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(counter.w0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(counter.w2) * 0xCD9E8D57u;
    counter = {
        static_cast<uint32_t>(product1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(product1),
        static_cast<uint32_t>(product0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The 32 random bits of candidate `id` in a draw.
[[maybe_unused]] KELIX_HOST_DEVICE constexpr uint32_t candidate_word(uint64_t seed, uint64_t step,
                                                                     uint32_t slot, uint32_t id) {
  return philox4x32({id, slot, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32))
      .w0;
}

// Uniform in (0, 1): the centre of one of 2^24 cells, and never 1, which the largest word would
// round to.
[[maybe_unused]] KELIX_HOST_DEVICE constexpr float uniform_of(uint32_t word) {
  const float u = (static_cast<float>(word >> 8) + 0.5f) * 0x1p-24f;
  return u < 1.0f ? u : 1.0f - 0x1p-24f;
}

// Known answers of Random123 (kat_vectors).
constexpr bool philox_gives(PhiloxWords counter, uint32_t key0, uint32_t key1, PhiloxWords wanted) {
  const PhiloxWords got = philox4x32(counter, key0, key1);
  return got.w0 == wanted.w0 && got.w1 == wanted.w1 && got.w2 == wanted.w2 && got.w3 == wanted.w3;
}
static_assert(philox_gives({0, 0, 0, 0}, 0, 0,
                           {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
static_assert(philox_gives({~0u, ~0u, ~0u, ~0u}, ~0u, ~0u,
                           {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
static_assert(philox_gives({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u,
                           0x299f31d0u, {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));

}  // namespace
}  // namespace kelix
