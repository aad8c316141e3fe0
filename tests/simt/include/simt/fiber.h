// A fiber: one CUDA thread's stack and registers. The scheduler resumes fibers, a fiber suspends
// itself, and nothing else switches.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Makes the next resume() call entry() on a fresh stack; whatever ran here before is dropped.
  // `entry` ends with exit(), it never returns.
  void start(void (*entry)());

  // Runs the fiber until it suspends or exits. Only the scheduler calls it.
  void resume();

  // Back to the scheduler. Called on the fiber itself.
  void suspend();
  [[noreturn]] void exit();

  // The first thing entry() does: tells the address sanitizer which stack it is on.
  static void entered();

 private:
  char* stack_ = nullptr;
  size_t unused_ = 0;  // bytes at its top
  bool exited_ = false;
  void* fake_stack_ = nullptr;  // of the address sanitizer
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace simt
