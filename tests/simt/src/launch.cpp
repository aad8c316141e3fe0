#include "simt/launch.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "simt/atomics.h"
#include "simt/schedule.h"
#include "simt/site.h"
#include "simt/state.h"
#include "simt/sync.h"

namespace simt {
namespace {

constexpr int kMaxThreads = 1024;            // per CTA
constexpr int64_t kMaxTogether = 64 * 1024;  // threads alive at once
constexpr int kMaxIdleRounds = 200;          // of pollers before it is a deadlock

std::string last_error;
int64_t launches = 0;

void run_thread() {
  Fiber::entered();
  try {
    (*active->body)();
  } catch (const Failure& failure) {
    if (active->error.empty()) active->error = failure.what();
  }
  current->done = true;
  release_after_exit(*current);
  current->fiber.exit();
}

void begin_cta(Cta& cta, uint3 index, size_t dynamic_shared) {
  const dim3& block = active->block;
  cta.index = index;
  cta.alive = static_cast<int>(cta.threads.size());
  cta.barrier = {};
  cta.shared.begin(dynamic_shared);
  cta.tile_copies.clear();
  for (Warp& warp : cta.warps) warp.alive = 0, warp.collectives.clear();
  int rank = 0;
  for (Thread& thread : cta.threads) {
    thread.cta = &cta;
    thread.rank = rank;
    const auto r = static_cast<unsigned>(rank++);
    thread.index = {r % block.x, r / block.x % block.y, r / block.x / block.y};
    thread.done = thread.asleep = false;
    thread.watched = nullptr;
    thread.call = {};
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.products.clear();
    thread.product_groups = 0;
    thread.fiber.start(run_thread);
    cta.warps[r / kLanes].alive |= 1u << r % kLanes;
  }
}

// CTAs of one shape, kept because stacks are costly to map.
std::vector<std::unique_ptr<Cta>>& cta_pool() {
  static std::vector<std::unique_ptr<Cta>> pool;
  return pool;
}

Cta& pooled_cta(size_t number, size_t num_threads) {
  auto& pool = cta_pool();
  while (pool.size() <= number) pool.push_back(std::make_unique<Cta>());
  Cta& cta = *pool[number];
  if (cta.threads.size() > num_threads) cta.threads.resize(num_threads);
  while (cta.threads.size() < num_threads) cta.threads.emplace_back();
  cta.warps.resize((num_threads + kLanes - 1) / kLanes);
  return cta;
}

// Runs a thread up to its next wait. False when it cannot go on in this round.
bool step(Thread& thread) {
  if (thread.done || thread.waits()) return false;
  current = &thread;
  thread.asleep = false;
  thread.fiber.resume();
  current = nullptr;
  if (!active->error.empty()) throw Failure(active->error);
  return !thread.done && !thread.asleep;
}

bool run_warp_greedily(std::vector<Thread*>& lanes) {
  bool ran = false;
  for (bool any = true; any;) {
    any = false;
    for (Thread* thread : lanes) {
      const bool runnable = !thread->done && !thread->waits();
      any |= step(*thread);
      ran |= runnable;
    }
  }
  return ran;
}

bool run_lanes_once(std::vector<Thread*>& lanes) {
  bool ran = false;
  for (Thread* thread : lanes) {
    ran |= !thread->done && !thread->waits();
    step(*thread);
  }
  return ran;
}

std::string deadlock_report(const std::vector<Cta*>& ctas) {
  std::string text = function_name(active->kernel) + ": deadlock, waiting are";
  int count = 0;
  const Call* last = nullptr;
  for (const Cta* cta : ctas) {
    for (const Thread& thread : cta->threads) {
      if (thread.done || (last != nullptr && last->site == thread.call.site)) continue;
      last = &thread.call;
      if (++count > 8) return text + " and more";
      text += std::string(count == 1 ? " " : "; ") + "thread " + std::to_string(thread.rank) +
              " of CTA " + std::to_string(cta->index.x) + " in " + thread.call.what + " at " +
              source_of(thread.call.site);
    }
  }
  return text;
}

// Runs CTAs that have begun until all their threads are done.
void run_ctas(const std::vector<Cta*>& ctas, Random& random) {
  std::vector<std::vector<Thread*>> warps;
  for (Cta* cta : ctas) {
    for (Thread& thread : cta->threads) {
      if (thread.lane() == 0) warps.emplace_back();
      warps.back().push_back(&thread);
    }
  }
  const Schedule order = schedule();
  uint64_t progress = active->progress;
  int idle_rounds = 0;
  while (!warps.empty()) {
    if (order.shuffled) {
      random.shuffle(warps);
      for (auto& lanes : warps) random.shuffle(lanes);
    }
    bool ran = false;
    for (auto& lanes : warps)
      ran |= order.greedy ? run_warp_greedily(lanes) : run_lanes_once(lanes);
    idle_rounds = active->progress == progress ? idle_rounds + 1 : 0;
    progress = active->progress;
    std::erase_if(warps, [](const auto& lanes) {
      return std::all_of(lanes.begin(), lanes.end(), [](const Thread* t) { return t->done; });
    });
    if (warps.empty() || (ran && idle_rounds <= kMaxIdleRounds)) continue;
    // Late copies land when nothing else can go on.
    const bool landed =
        std::any_of(ctas.begin(), ctas.end(), [](Cta* cta) { return land_tile_copy(*cta); });
    if (!landed) throw Failure(deadlock_report(ctas));
  }
  for (const Cta* cta : ctas) {
    if (!cta->tile_copies.empty()) {
      throw Failure(function_name(active->kernel) + ": CTA " + std::to_string(cta->index.x) +
                    " ended before its tile copies landed");
    }
    if (const char* name = cta->shared.overrun()) {
      throw Failure(function_name(active->kernel) + ": shared array `" + name +
                    "` was written past its end by CTA " + std::to_string(cta->index.x));
    }
  }
}

void check_configuration(const Launch& launch, size_t dynamic_shared, Residency residency) {
  const dim3 g = launch.grid;
  const dim3 b = launch.block;
  const int64_t threads = static_cast<int64_t>(b.x) * b.y * b.z;
  const int64_t ctas = static_cast<int64_t>(g.x) * g.y * g.z;
  const std::string name = function_name(launch.kernel);
  if (threads < 1 || threads > kMaxThreads || b.z > 64) {
    throw Failure(name + ": a CTA must have 1 to 1024 threads, got " + std::to_string(threads));
  }
  if (ctas < 1 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    throw Failure(name + ": grid must lie in [1, (2^31-1, 65535, 65535)], got " +
                  std::to_string(g.x) + ", " + std::to_string(g.y) + ", " + std::to_string(g.z));
  }
  if (dynamic_shared > SharedMemory::kMaxTotal) {
    throw Failure(name + ": at most 227 KiB of dynamic shared memory, got " +
                  std::to_string(dynamic_shared) + " bytes");
  }
  if (residency == Residency::kTogether && ctas * threads > kMaxTogether) {
    throw Failure(name +
                  ": too many threads to be alive together: " + std::to_string(ctas * threads));
  }
}

void run(const Launch& launch, size_t dynamic_shared, Residency residency) {
  check_configuration(launch, dynamic_shared, residency);
  const dim3 grid = launch.grid;
  const dim3 block = launch.block;
  const size_t num_threads = static_cast<size_t>(block.x) * block.y * block.z;
  const int64_t num_ctas = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  std::vector<int64_t> order(static_cast<size_t>(num_ctas));
  for (int64_t i = 0; i < num_ctas; ++i) order[static_cast<size_t>(i)] = i;
  Random random(schedule().seed);
  if (schedule().shuffled) random.shuffle(order);
  std::vector<Cta*> alive;
  for (const int64_t i : order) {
    Cta& cta = pooled_cta(alive.size(), num_threads);
    const uint3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                      static_cast<unsigned>(i / grid.x / grid.y)};
    begin_cta(cta, index, dynamic_shared);
    alive.push_back(&cta);
    if (residency == Residency::kSequential) {
      run_ctas(alive, random);
      alive.clear();
    }
  }
  if (!alive.empty()) run_ctas(alive, random);
}

}  // namespace

Schedule& schedule() {
  static Schedule chosen;
  return chosen;
}

__attribute__((noinline)) void poll_pause() {
  Thread& thread = *current;
  thread.call = {"__nanosleep", __builtin_return_address(0)};
  thread.asleep = true;
  thread.fiber.suspend();
}

void launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, Residency residency,
            const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch launch{kernel, grid, block, &body, 0, {}};
  active = &launch;
  ++launches;
  try {
    run(launch, dynamic_shared, residency);
  } catch (const Failure& failure) {
    if (last_error.empty())
      last_error = std::string(failure.what()) + " [" + name_of(schedule()) + "]";
  }
  active = nullptr;
  current = nullptr;
}

int64_t launch_count() { return launches; }

int& compute_capability() {
  static int chosen = 90;
  return chosen;
}

std::string take_error() { return std::exchange(last_error, {}); }

}  // namespace simt

namespace {
std::string reported;
}

cudaError_t cudaGetLastError() {
  reported = simt::take_error();
  return reported.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : reported.c_str();
}
