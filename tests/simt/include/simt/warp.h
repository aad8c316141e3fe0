// CUDA's warp intrinsics: shuffles, votes, reductions.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "simt/sync.h"

#define KELIX_SIMT_INTRINSIC __attribute__((always_inline)) inline

KELIX_SIMT_INTRINSIC void __syncthreads() { simt::barrier(); }

KELIX_SIMT_INTRINSIC void __syncwarp(uint32_t mask = 0xffffffffu) {
  simt::exchange("__syncwarp", mask, 0);
}

template <class T>
KELIX_SIMT_INTRINSIC T __shfl_sync(uint32_t mask, T value, int source, int width = simt::kLanes) {
  const simt::Exchange all = simt::exchange("__shfl_sync", mask, value);
  const int segment = simt::current->lane() & ~(width - 1);
  return all.asked<T>(segment + (source & (width - 1)));
}

template <class T>
KELIX_SIMT_INTRINSIC T __shfl_xor_sync(uint32_t mask, T value, int lane_mask,
                                       int width = simt::kLanes) {
  const simt::Exchange all = simt::exchange("__shfl_xor_sync", mask, value);
  const int source = simt::current->lane() ^ lane_mask;
  // A source beyond the own segment leaves the value as it is.
  return source / width > simt::current->lane() / width ? value : all.asked<T>(source);
}

template <class T>
KELIX_SIMT_INTRINSIC T __shfl_down_sync(uint32_t mask, T value, unsigned delta,
                                        int width = simt::kLanes) {
  const simt::Exchange all = simt::exchange("__shfl_down_sync", mask, value);
  const int lane = simt::current->lane();
  const bool inside = (lane & (width - 1)) + static_cast<int>(delta) < width;
  return inside ? all.asked<T>(lane + static_cast<int>(delta)) : value;
}

template <class T>
KELIX_SIMT_INTRINSIC T __shfl_up_sync(uint32_t mask, T value, unsigned delta,
                                      int width = simt::kLanes) {
  const simt::Exchange all = simt::exchange("__shfl_up_sync", mask, value);
  const int lane = simt::current->lane();
  const bool inside = (lane & (width - 1)) >= static_cast<int>(delta);
  return inside ? all.asked<T>(lane - static_cast<int>(delta)) : value;
}

namespace simt {

inline uint32_t votes(const Exchange& all) {
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((all.present >> lane & 1) != 0 && all.from<bool>(lane)) bits |= 1u << lane;
  }
  return bits;
}

template <class T, class F>
T reduce(const Exchange& all, const F& combine) {
  T result{};
  bool first = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((all.present >> lane & 1) == 0) continue;
    result = first ? all.from<T>(lane) : combine(result, all.from<T>(lane));
    first = false;
  }
  return result;
}

}  // namespace simt

KELIX_SIMT_INTRINSIC uint32_t __ballot_sync(uint32_t mask, bool vote) {
  return simt::votes(simt::exchange("__ballot_sync", mask, vote));
}

KELIX_SIMT_INTRINSIC int __any_sync(uint32_t mask, bool vote) {
  return simt::votes(simt::exchange("__any_sync", mask, vote)) != 0;
}

KELIX_SIMT_INTRINSIC int __all_sync(uint32_t mask, bool vote) {
  const simt::Exchange all = simt::exchange("__all_sync", mask, vote);
  return simt::votes(all) == all.present;
}

template <class T>
KELIX_SIMT_INTRINSIC T __reduce_add_sync(uint32_t mask, T value) {
  return simt::reduce<T>(simt::exchange("__reduce_add_sync", mask, value),
                         [](T a, T b) { return a + b; });
}

template <class T>
KELIX_SIMT_INTRINSIC T __reduce_max_sync(uint32_t mask, T value) {
  return simt::reduce<T>(simt::exchange("__reduce_max_sync", mask, value),
                         [](T a, T b) { return std::max(a, b); });
}

template <class T>
KELIX_SIMT_INTRINSIC T __reduce_min_sync(uint32_t mask, T value) {
  return simt::reduce<T>(simt::exchange("__reduce_min_sync", mask, value),
                         [](T a, T b) { return std::min(a, b); });
}
