// Shared memory of a CTA. Every array is an allocation of its own, so the address sanitizer sees
// overruns; without it, guard bytes do at the end of the CTA. Fresh memory is NaN or -1.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace simt {

class SharedMemory {
 public:
  static constexpr size_t kMaxStatic = 48 << 10;
  static constexpr size_t kMaxTotal = 227 << 10;  // sm_90, the largest

  // A new CTA with `dynamic_size` bytes of dynamic shared memory begins.
  void begin(size_t dynamic_size);

  // The array declared under `key`, the same for every thread of the CTA.
  void* array(const void* key, size_t size, const char* name);
  void* dynamic();

  // Name of an array that was written past its end, or null.
  const char* overrun() const;

 private:
  struct Free {
    void operator()(unsigned char* memory) const;
  };
  struct Block {
    const void* key;
    const char* name;
    size_t size;
    bool used;  // by this CTA
    std::unique_ptr<unsigned char, Free> memory;
  };

  static Block allocate(const void* key, size_t size, const char* name);
  static void poison(Block& block);

  std::vector<Block> arrays_;
  std::vector<Block> dynamic_;  // none or one
};

// For the macros below: the current CTA's arrays.
void* shared_array(const void* key, size_t size, const char* name);
void* dynamic_shared();

}  // namespace simt
