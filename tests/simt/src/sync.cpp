#include "simt/sync.h"

#include <string>

#include "simt/site.h"

namespace simt {
namespace {

std::string where(const Call& call) {
  return call.site == nullptr ? call.what : std::string(call.what) + " at " + source_of(call.site);
}

void open_barrier(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
}

void complete(Collective& collective) {
  collective.present[collective.generation & 1] = collective.arrived;
  collective.arrived = 0;
  ++collective.generation;
}

Collective& collective_of(Warp& warp, uint32_t mask) {
  for (Collective& collective : warp.collectives) {
    if (collective.mask == mask) return collective;
  }
  warp.collectives.emplace_back().mask = mask;
  return warp.collectives.back();
}

}  // namespace

void fail(const Call& call, const std::string& reason) {
  const uint3 cta = current->cta->index;
  throw Failure(function_name(active->kernel) + ", CTA (" + std::to_string(cta.x) + ", " +
                std::to_string(cta.y) + ", " + std::to_string(cta.z) + "), thread " +
                std::to_string(current->rank) + ", " + where(call) + ": " + reason);
}

void wait_while(const uint32_t* watched, uint32_t seen, const Call& call) {
  Thread& thread = *current;
  thread.watched = watched;
  thread.seen = seen;
  thread.call = call;
  while (thread.waits()) thread.fiber.suspend();
  thread.watched = nullptr;
}

void check_same_call(const Call& mine, const Call& first, const char* who) {
  if (mine.site == first.site && mine.what == first.what) return;
  // The compiler may have copied the code of one call to several addresses.
  if (std::string(mine.what) == first.what && source_of(mine.site) == source_of(first.site)) return;
  fail(mine, std::string(who) + " meet in different calls, another is in " + where(first));
}

__attribute__((noinline)) void barrier() {
  const Call call{"__syncthreads", __builtin_return_address(0)};
  Cta& cta = *current->cta;
  Barrier& barrier = cta.barrier;
  if (barrier.arrived == 0) {
    barrier.first = call;
  } else {
    check_same_call(call, barrier.first, "threads of a CTA");
  }
  ++active->progress;
  if (++barrier.arrived == cta.alive) {
    open_barrier(barrier);
  } else {
    wait_while(&barrier.generation, barrier.generation, call);
  }
}

__attribute__((noinline)) Exchange exchange(const char* what, uint32_t mask, const void* value,
                                            size_t size) {
  const Call call{what, __builtin_return_address(0)};
  Warp& warp = current_warp();
  const int lane = current->lane();
  const uint32_t bit = 1u << lane;
  if ((mask & bit) == 0) fail(call, "the mask leaves out the calling lane");
  Collective& collective = collective_of(warp, mask);
  if (collective.arrived == 0) {
    collective.first = call;
  } else {
    check_same_call(call, collective.first, "lanes of a warp");
  }
  const uint32_t generation = collective.generation;
  const uint32_t buffer = generation & 1;
  std::memcpy(collective.slots[buffer][lane].bytes, value, size);
  collective.arrived |= bit;
  ++active->progress;
  if (collective.arrived == (mask & warp.alive)) {
    complete(collective);
  } else {
    wait_while(&collective.generation, generation, call);
  }
  return {collective.slots[buffer], collective.present[buffer], call};
}

void Exchange::check_present(int lane) const {
  if ((present >> lane & 1) == 0) {
    fail(call, "reads lane " + std::to_string(lane) + ", which takes no part (mask or exit)");
  }
}

void release_after_exit(Thread& thread) {
  Cta& cta = *thread.cta;
  --cta.alive;
  ++active->progress;
  if (cta.barrier.arrived > 0 && cta.barrier.arrived == cta.alive) open_barrier(cta.barrier);
  Warp& warp = cta.warps[static_cast<size_t>(thread.rank / kLanes)];
  warp.alive &= ~(1u << thread.lane());
  for (Collective& collective : warp.collectives) {
    if (collective.arrived != 0 && collective.arrived == (collective.mask & warp.alive)) {
      complete(collective);
    }
  }
}

}  // namespace simt
