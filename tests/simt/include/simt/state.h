// What the harness knows of a thread, a warp, a CTA and the launch that is running.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/fiber.h"
#include "simt/shared.h"
#include "simt/vector_types.h"

namespace kelix {
struct SharedBarrier;
}  // namespace kelix

namespace simt {

inline constexpr int kLanes = 32;

// An operation of a thread and the return address that tells where in the kernel it is.
struct Call {
  const char* what = "nothing";
  const void* site = nullptr;
};

// Threads that arrive wait until the generation changes.
struct Barrier {
  uint32_t generation = 0;
  int arrived = 0;
  Call first;  // the call of the first arrival; all others must make the same one
};

// The largest value that lanes exchange: the operands of one mma.
struct Slot {
  alignas(16) unsigned char bytes[32];
};

// The rendezvous of the lanes of one mask. Two buffers: the slower lanes still read the last
// exchange while the faster ones already write the next.
struct Collective {
  uint32_t mask = 0;
  uint32_t generation = 0;
  uint32_t arrived = 0;
  Call first;
  uint32_t present[2] = {};  // lanes that took part
  Slot slots[2][kLanes];
};

struct Warp {
  uint32_t alive = 0;  // lanes that exist and have not exited
  std::deque<Collective> collectives;
};

// A copy that was issued and has not landed.
struct Copy {
  void* target;
  const void* source;
  uint32_t size;   // bytes from the source
  uint32_t width;  // bytes written; those past `size` are zero
  uint32_t group;
};

// A matrix of 16-bit elements and the box that the TMA unit copies of it.
struct TileSource {
  const uint16_t* matrix;
  int64_t rows;
  int64_t cols;
  int box_rows;
};

// A copy by the TMA unit that has not landed; the thread that issued it may be gone.
struct TileCopy {
  void* target;
  TileSource source;
  kelix::SharedBarrier* barrier;
  int row;
  int column;
};

// The descriptors of the two factors of a warpgroup's product.
struct ProductTiles {
  uint64_t a;
  uint64_t b;
};

// A warpgroup's product that was issued and not waited for: one thread's share.
struct Product {
  float* d;
  uint64_t a;
  uint64_t b;
  bool accumulate;
  bool is_bf16;
  uint32_t group;
};

struct Cta;

struct Thread {
  Fiber fiber;
  Cta* cta = nullptr;
  uint3 index{};
  int rank = 0;  // in the CTA
  bool done = false;
  bool asleep = false;                // in a polling loop
  const uint32_t* watched = nullptr;  // waits while *watched == seen
  uint32_t seen = 0;
  Call call;
  std::vector<Copy> copies;
  uint32_t copy_groups = 0;  // committed so far
  std::deque<Product> products;
  uint32_t product_groups = 0;

  int lane() const { return rank % kLanes; }
  bool waits() const { return watched != nullptr && *watched == seen; }
};

struct Cta {
  uint3 index{};
  int alive = 0;
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  SharedMemory shared;
  std::deque<TileCopy> tile_copies;
};

struct Launch {
  const void* kernel = nullptr;
  dim3 grid;
  dim3 block;
  const std::function<void()>* body = nullptr;
  uint64_t progress = 0;  // arrivals, changed atomics and exits; standing still means deadlock
  std::string error;
};

// The thread that runs and the launch it belongs to; null between launches.
inline Thread* current = nullptr;
inline Launch* active = nullptr;

inline Warp& current_warp() {
  return current->cta->warps[static_cast<size_t>(current->rank / kLanes)];
}

// Ends the launch with an error text. Thrown in a kernel, caught at the bottom of its fiber.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws a Failure that names the kernel, the CTA, the thread and the source line of `call`.
[[noreturn]] void fail(const Call& call, const std::string& reason);

// Lets the oldest tile copy of a CTA land; false when it has none.
bool land_tile_copy(Cta& cta);

// Suspends the current thread while *watched == seen.
void wait_while(const uint32_t* watched, uint32_t seen, const Call& call);

// Fails unless both calls are the same operation at the same place of the kernel.
void check_same_call(const Call& mine, const Call& first, const char* who);

}  // namespace simt
