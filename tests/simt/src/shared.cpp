#include "simt/shared.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "simt/state.h"

namespace simt {
namespace {

constexpr size_t kAlignment = 1024;
constexpr unsigned char kFresh = 0xff;
constexpr unsigned char kGuard = 0xa5;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardSize = 0;  // the sanitizer's red zone follows at once
#else
constexpr size_t kGuardSize = 256;
#endif

}  // namespace

void SharedMemory::Free::operator()(unsigned char* memory) const { std::free(memory); }

SharedMemory::Block SharedMemory::allocate(const void* key, size_t size, const char* name) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kAlignment, size + kGuardSize) != 0) throw std::bad_alloc();
  return {key, name, size, false,
          std::unique_ptr<unsigned char, Free>(static_cast<unsigned char*>(memory))};
}

void SharedMemory::poison(Block& block) {
  block.used = true;
  std::memset(block.memory.get(), kFresh, block.size);
  std::memset(block.memory.get() + block.size, kGuard, kGuardSize);
}

void SharedMemory::begin(size_t dynamic_size) {
  for (Block& block : arrays_) block.used = false;
  if (dynamic_.empty() || dynamic_[0].size != dynamic_size) {
    dynamic_.clear();
    if (dynamic_size > 0) dynamic_.push_back(allocate(nullptr, dynamic_size, "dynamic shared"));
  }
  for (Block& block : dynamic_) poison(block);
}

void* SharedMemory::array(const void* key, size_t size, const char* name) {
  const Call call{name, nullptr};
  for (Block& block : arrays_) {
    if (block.key != key) continue;
    if (!block.used) poison(block);
    return block.memory.get();
  }
  arrays_.push_back(allocate(key, size, name));
  poison(arrays_.back());
  size_t total = 0;
  for (const Block& block : arrays_) total += block.used ? block.size : 0;
  if (total > kMaxStatic) {
    fail(call, "static shared memory grows to " + std::to_string(total) + " bytes, 48 KiB is all");
  }
  return arrays_.back().memory.get();
}

void* SharedMemory::dynamic() {
  if (dynamic_.empty()) {
    fail({"dynamic shared memory", nullptr}, "the launch asked for no dynamic shared memory");
  }
  return dynamic_[0].memory.get();
}

const char* SharedMemory::overrun() const {
  const auto spoilt = [](const Block& block) {
    const unsigned char* guard = block.memory.get() + block.size;
    return block.used && std::any_of(guard, guard + kGuardSize,
                                     [](unsigned char byte) { return byte != kGuard; });
  };
  for (const std::vector<Block>* blocks : {&arrays_, &dynamic_}) {
    for (const Block& block : *blocks) {
      if (spoilt(block)) return block.name;
    }
  }
  return nullptr;
}

void* shared_array(const void* key, size_t size, const char* name) {
  return current->cta->shared.array(key, size, name);
}

void* dynamic_shared() { return current->cta->shared.dynamic(); }

}  // namespace simt
