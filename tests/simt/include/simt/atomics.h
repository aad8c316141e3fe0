// Atomics, fences and polling. One thread runs at a time, so plain memory accesses are atomic; what
// counts is that a change wakes pollers and that endless polling is noticed.
#pragma once

#include <algorithm>

#include "simt/state.h"

namespace simt {

// Stores what `next` makes of the old value, which is returned.
template <class T, class F>
T atomic_update(T* address, const F& next) {
  const T old = *address;
  const T value = next(old);
  if (value != old) {
    *address = value;
    ++active->progress;
  }
  return old;
}

// A step of a polling loop: lets the others run.
void poll_pause();

}  // namespace simt

template <class T>
T atomicAdd(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicOr(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* address, T value) {
  return simt::atomic_update(address, [&](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicExch(T* address, T value) {
  return simt::atomic_update(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  return simt::atomic_update(address, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
__attribute__((always_inline)) inline void __nanosleep(unsigned) { simt::poll_pause(); }
