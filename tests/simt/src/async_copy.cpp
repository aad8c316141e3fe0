#include "simt/async_copy.h"

#include <cstring>
#include <string>

#include "simt/schedule.h"
#include "simt/state.h"

namespace simt {
namespace {

void land(const Copy& copy) {
  std::memset(copy.target, 0, copy.width);
  std::memcpy(copy.target, copy.source, copy.size);
}

}  // namespace

__attribute__((noinline)) void copy_async(void* shared, const void* global, uint32_t size,
                                          uint32_t width) {
  const Call call{"cp.async", __builtin_return_address(0)};
  if (reinterpret_cast<uintptr_t>(shared) % width != 0) fail(call, "misaligned shared address");
  if (reinterpret_cast<uintptr_t>(global) % width != 0) fail(call, "misaligned global address");
  if (size > width) {
    fail(call, "copies at most " + std::to_string(width) + " bytes, got " + std::to_string(size));
  }
  const Copy copy{shared, global, size, width, current->copy_groups};
  if (schedule().late_copies) {
    current->copies.push_back(copy);
  } else {
    land(copy);
  }
}

void commit_copies() { ++current->copy_groups; }

void wait_for_copies(uint32_t pending) {
  Thread& thread = *current;
  size_t landed = 0;
  while (landed < thread.copies.size() &&
         thread.copies[landed].group + pending < thread.copy_groups) {
    land(thread.copies[landed++]);
  }
  thread.copies.erase(thread.copies.begin(),
                      thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace simt
