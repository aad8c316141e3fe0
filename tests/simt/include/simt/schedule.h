// The order in which threads run and copies land: eight schedules. A kernel with all its barriers
// gives the same result under each of them; one that lacks a barrier fails under some.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace simt {

struct Schedule {
  bool shuffled = false;     // threads and CTAs in a new random order every round, else by rank
  bool late_copies = false;  // asynchronous copies land at the wait for them, else at once
  bool greedy = false;       // a warp runs as far as it can get, else every thread one step
  uint64_t seed = 1;         // of the random order
};

inline constexpr int kNumSchedules = 8;

inline Schedule schedule_of(int number, uint64_t seed = 1) {
  return {(number & 1) != 0, (number & 2) != 0, (number & 4) != 0, seed};
}

inline std::string name_of(const Schedule& schedule) {
  return std::string(schedule.shuffled ? "shuffled" : "ranked") +
         (schedule.late_copies ? "-late" : "-eager") + (schedule.greedy ? "-greedy" : "-fair");
}

// The schedule of the launches to come.
Schedule& schedule();

// xorshift64*: the same order on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15ull | 1) {}

  uint64_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545F4914F6CDD1Dull;
  }

  template <class Container>
  void shuffle(Container& values) {
    for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[next() % i]);
  }

 private:
  uint64_t state_;
};

}  // namespace simt
