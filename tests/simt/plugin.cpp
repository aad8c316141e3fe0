// What plugin.py calls through ctypes.
#include <cstdint>

#include "simt/launch.h"
#include "simt/schedule.h"

extern "C" {

// Chooses one of the eight schedules for the launches to come.
__attribute__((visibility("default"))) void kelix_simt_use_schedule(int number, uint64_t seed) {
  simt::schedule() = simt::schedule_of(number, seed);
}

// Which GPU the launchers believe to run on: 10 major + minor.
__attribute__((visibility("default"))) void kelix_simt_use_capability(int capability) {
  simt::compute_capability() = capability;
}

__attribute__((visibility("default"))) int64_t kelix_simt_launch_count() {
  return simt::launch_count();
}

}  // extern "C"
