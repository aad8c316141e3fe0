// The harness has no caches.
#pragma once

#include "simt/vector_types.h"

namespace kelix {

struct CachePolicy {};
inline CachePolicy cache_normally() { return {}; }
inline CachePolicy cache_briefly() { return {}; }

inline uint4 load_raw_16_bytes(const void* from, CachePolicy) {
  return *static_cast<const uint4*>(from);
}

// A line that is asked for must exist: the address sanitizer watches the read.
inline void prefetch_line(const void* address) {
  static volatile char sink;
  sink = *static_cast<const char*>(address);
}

}  // namespace kelix
