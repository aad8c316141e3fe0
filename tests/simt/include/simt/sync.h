// Barriers of a CTA and rendezvous of the lanes of a warp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/state.h"

namespace simt {

// Functions that take a Call's site from their own return address must not be inlined; what calls
// them must be, so that the address lies in the kernel.
void barrier();

// What the lanes of one exchange brought along; valid until the thread's next collective.
struct Exchange {
  const Slot* slots;
  uint32_t present;
  Call call;

  template <class T>
  T from(int lane) const {
    T value;
    std::memcpy(&value, slots[lane].bytes, sizeof value);
    return value;
  }
  // As from(), for a lane that the kernel asked for: fails when it did not take part.
  template <class T>
  T asked(int lane) const {
    check_present(lane);
    return from<T>(lane);
  }
  void check_present(int lane) const;
};

// Waits until every living lane of `mask` arrives with its own `size` bytes.
Exchange exchange(const char* what, uint32_t mask, const void* value, size_t size);

template <class T>
__attribute__((always_inline)) inline Exchange exchange(const char* what, uint32_t mask,
                                                        const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot) && std::is_trivially_copyable_v<T>);
  return exchange(what, mask, &value, sizeof value);
}

// The thread has exited: who waited only for it goes on.
void release_after_exit(Thread& thread);

}  // namespace simt
