// sm_90a: barriers in shared memory, tile copies, products of a warpgroup. Copies and products run
// between their issue and the wait for them, at one end or the other as the schedule says.
#pragma once

#include <cstdint>
#include <type_traits>

#include "simt/numbers.h"
#include "simt/sync.h"

#define __grid_constant__

namespace kelix {

struct SharedBarrier {
  uint32_t phase;
  int arrivals;  // of a phase
  int missing;   // arrivals of the current one
  int bytes;     // announced and not yet copied
};

using TensorMap = simt::TileSource;

}  // namespace kelix

namespace simt {

void init_barrier(kelix::SharedBarrier* barrier, int arrivals);
void arrive_at(kelix::SharedBarrier* barrier, int bytes);
void wait_for_phase(kelix::SharedBarrier* barrier, uint32_t parity);

void copy_tile(void* shared, const TileSource& source, kelix::SharedBarrier* barrier, int row,
               int column);

// As on the device, the address counted from the start of the dynamic shared memory.
uint64_t tile_descriptor(const void* tile);

// Lanes of a warp must bring the same descriptors.
void multiply_tiles(const Exchange& lanes, const Product& product);
void commit_products();
void wait_for_products(uint32_t pending);

}  // namespace simt

namespace kelix {

inline void barrier_init(SharedBarrier* barrier, int arrivals) {
  simt::init_barrier(barrier, arrivals);
}
inline void barrier_init_fence() {}
__attribute__((always_inline)) inline void barrier_arrive(SharedBarrier* barrier) {
  simt::arrive_at(barrier, 0);
}
__attribute__((always_inline)) inline void barrier_arrive_expecting(SharedBarrier* barrier,
                                                                    uint32_t bytes) {
  simt::arrive_at(barrier, static_cast<int>(bytes));
}
__attribute__((always_inline)) inline void barrier_wait(SharedBarrier* barrier, uint32_t parity) {
  simt::wait_for_phase(barrier, parity);
}

__attribute__((always_inline)) inline void copy_tile(void* shared, const TensorMap* map,
                                                     SharedBarrier* barrier, int row, int column) {
  simt::copy_tile(shared, *map, barrier, row, column);
}

inline void fence_for_tensor_cores() {}

__attribute__((always_inline)) inline uint64_t tile_descriptor(const void* tile) {
  return simt::tile_descriptor(tile);
}

__attribute__((always_inline)) inline void warpgroup_fence() {
  simt::exchange("wgmma.fence", 0xffffffffu, 0);
}
__attribute__((always_inline)) inline void warpgroup_commit() {
  simt::exchange("wgmma.commit_group", 0xffffffffu, 0);
  simt::commit_products();
}
template <int kPending, int kCount>
__attribute__((always_inline)) inline void warpgroup_wait(float (&)[kCount]) {
  simt::wait_for_products(kPending);
  simt::exchange("wgmma.wait_group", 0xffffffffu,
                 0);  // the warp goes on when all its lanes are done
}

template <class T>
__attribute__((always_inline)) inline void warpgroup_mma(float (&d)[64], uint64_t a, uint64_t b,
                                                         bool accumulate) {
  const simt::Product product{d, a, b, accumulate, std::is_same_v<T, __nv_bfloat16>, 0};
  simt::multiply_tiles(simt::exchange("wgmma", 0xffffffffu, simt::ProductTiles{a, b}), product);
}

template <class T>
bool make_tensor_map(TensorMap* map, const T* matrix, int64_t rows, int64_t cols, int box_rows) {
  static_assert(sizeof(T) == 2);
  *map = {reinterpret_cast<const uint16_t*>(matrix), rows, cols, box_rows};
  return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && cols % 8 == 0 && box_rows <= 256;
}

}  // namespace kelix
