#include "simt/hopper.h"

#include <cstring>
#include <string>

#include "simt/schedule.h"
#include "simt/state.h"

namespace simt {
namespace {

constexpr int kBoxColumns = 64;
constexpr size_t kRowBytes = kBoxColumns * sizeof(uint16_t);

// Ends the phase when nothing is missing.
void advance(kelix::SharedBarrier& barrier) {
  ++active->progress;
  if (barrier.missing != 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
}

// Where the 128-byte swizzle puts a byte; both count from an address aligned to 1024.
size_t swizzled(size_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

void land(const TileCopy& copy) {
  const TileSource& source = copy.source;
  auto* target = static_cast<unsigned char*>(copy.target);
  for (int r = 0; r < source.box_rows; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const int64_t row = copy.row + r;
      const int64_t column = copy.column + c;
      const bool inside = row >= 0 && row < source.rows && column >= 0 && column < source.cols;
      const uint16_t value = inside ? source.matrix[row * source.cols + column] : uint16_t{0};
      std::memcpy(target + swizzled(static_cast<size_t>(r) * kRowBytes +
                                    static_cast<size_t>(c) * sizeof value),
                  &value, sizeof value);
    }
  }
  copy.barrier->bytes -= source.box_rows * static_cast<int>(kRowBytes);
  advance(*copy.barrier);
}

float widened(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

// Element (row, column) of the tile of a descriptor.
float element(const Product& product, uint64_t descriptor, int row, int column) {
  const auto* base = static_cast<const unsigned char*>(dynamic_shared());
  const size_t start = (descriptor & 0x3fff) << 4;
  const size_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  const size_t offset = start + static_cast<size_t>(row / 8) * eight_rows +
                        static_cast<size_t>(row % 8) * kRowBytes +
                        static_cast<size_t>(column) * sizeof(uint16_t);
  uint16_t bits;
  std::memcpy(&bits, base + swizzled(offset), sizeof bits);
  return widened(bits, product.is_bf16);
}

// This thread's part of a product.
void perform(const Product& product) {
  const int thread = current->rank % 128;
  for (int i = 0; i < 64; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      sum += element(product, product.a, row, k) * element(product, product.b, column, k);
    }
    product.d[i] = product.accumulate ? product.d[i] + sum : sum;
  }
}

}  // namespace

__attribute__((noinline)) void init_barrier(kelix::SharedBarrier* barrier, int arrivals) {
  const Call call{"mbarrier.init", __builtin_return_address(0)};
  if (arrivals < 1) fail(call, "needs at least one arrival, got " + std::to_string(arrivals));
  *barrier = {0, arrivals, arrivals, 0};
}

__attribute__((noinline)) void arrive_at(kelix::SharedBarrier* barrier, int bytes) {
  const Call call{"mbarrier.arrive", __builtin_return_address(0)};
  if (barrier->arrivals < 1) fail(call, "the barrier was not initialised");
  if (barrier->missing < 1) fail(call, "more arrivals than the phase has");
  barrier->bytes += bytes;
  --barrier->missing;
  advance(*barrier);
}

__attribute__((noinline)) void wait_for_phase(kelix::SharedBarrier* barrier, uint32_t parity) {
  const Call call{"mbarrier.try_wait", __builtin_return_address(0)};
  if (barrier->arrivals < 1) fail(call, "the barrier was not initialised");
  while ((barrier->phase & 1) == parity) wait_while(&barrier->phase, barrier->phase, call);
}

__attribute__((noinline)) void copy_tile(void* shared, const TileSource& source,
                                         kelix::SharedBarrier* barrier, int row, int column) {
  const Call call{"cp.async.bulk.tensor", __builtin_return_address(0)};
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) {
    fail(call, "a swizzled tile must be aligned to 1024 bytes");
  }
  if (barrier->arrivals < 1) fail(call, "the barrier was not initialised");
  const TileCopy copy{shared, source, barrier, row, column};
  if (schedule().late_copies) {
    current->cta->tile_copies.push_back(copy);
  } else {
    land(copy);
  }
}

bool land_tile_copy(Cta& cta) {
  if (cta.tile_copies.empty()) return false;
  const TileCopy copy = cta.tile_copies.front();
  cta.tile_copies.pop_front();
  land(copy);
  return true;
}

__attribute__((noinline)) uint64_t tile_descriptor(const void* tile) {
  const auto offset = static_cast<uint64_t>(static_cast<const unsigned char*>(tile) -
                                            static_cast<const unsigned char*>(dynamic_shared()));
  if (offset % 1024 != 0) {
    fail({"tile descriptor", __builtin_return_address(0)}, "misaligned tile");
  }
  return offset >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

void multiply_tiles(const Exchange& lanes, const Product& product) {
  const auto first = lanes.asked<ProductTiles>(0);
  if (first.a != product.a || first.b != product.b) {
    fail(lanes.call, "lanes of a warp name different tiles");
  }
  if (schedule().late_copies) {
    current->products.push_back(product);
    current->products.back().group = current->product_groups;
  } else {
    perform(product);
  }
}

void commit_products() { ++current->product_groups; }

void wait_for_products(uint32_t pending) {
  Thread& thread = *current;
  while (!thread.products.empty() &&
         thread.products.front().group + pending < thread.product_groups) {
    perform(thread.products.front());
    thread.products.pop_front();
  }
}

}  // namespace simt
