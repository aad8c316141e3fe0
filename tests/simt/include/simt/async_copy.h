// cp.async: copies of 4, 8 or 16 bytes into shared memory that land between their issue and the wait
// for their group, at one end or the other of that time as the schedule says.
#pragma once

#include <cstdint>

namespace simt {

// Writes `width` (4, 8 or 16) bytes: `size` of them come from the source, the rest is zero.
void copy_async(void* shared, const void* global, uint32_t size, uint32_t width);
void commit_copies();
// Until at most `pending` of the latest groups are in flight.
void wait_for_copies(uint32_t pending);

}  // namespace simt

namespace kelix {

inline void copy_async_16(void* shared, const void* global) {
  simt::copy_async(shared, global, 16, 16);
}
inline void copy_async_16_zero_fill(void* shared, const void* global, uint32_t size) {
  simt::copy_async(shared, global, size, 16);
}
inline void copy_async_8_zero_fill(void* shared, const void* global, uint32_t size) {
  simt::copy_async(shared, global, size, 8);
}
inline void copy_async_4(void* shared, const void* global) {
  simt::copy_async(shared, global, 4, 4);
}
inline void copy_async_commit() { simt::commit_copies(); }
template <int kPending>
inline void copy_async_wait() {
  simt::wait_for_copies(kPending);
}

}  // namespace kelix
