#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackSize = 256 << 10;  // frames grow by the red zones
#else
constexpr size_t kStackSize = 64 << 10;
#endif
constexpr size_t kGuardSize = 4096;
[[maybe_unused]] constexpr size_t kFirstFrames = 8192;  // down to exit()

// Stacks that all began at the same offset of a page would fight for the same cache lines.
constexpr size_t kColours = 61;
constexpr size_t kColourStep = 64;
size_t next_colour = 0;

char* map_stack() {
  void* memory = mmap(nullptr, kGuardSize + kStackSize, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardSize, PROT_NONE);  // an overflow faults instead of spoiling a neighbour
  return static_cast<char*>(memory) + kGuardSize;
}

// The scheduler's own stack, learned when a fiber is first entered from it.
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

void announce_switch([[maybe_unused]] void** saved, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(saved, stack, size);
#endif
}

void finish_switch([[maybe_unused]] void* saved) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}

}  // namespace

#if defined(__x86_64__)
// Saves the callee-saved registers on the current stack, stores its pointer, and continues on the
// other stack. A jump in place of `ret`: the processor would predict a return to the wrong stack.
extern "C" void kelix_simt_switch(void** from, void* to);
asm(R"(
.text
.hidden kelix_simt_switch
.globl kelix_simt_switch
.type kelix_simt_switch, @function
kelix_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size kelix_simt_switch, .-kelix_simt_switch
)");

namespace {
void* scheduler_context = nullptr;
}
#else
namespace {
ucontext_t scheduler_context;
}
#endif

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_ - kGuardSize, kGuardSize + kStackSize);
}

void Fiber::start(void (*entry)()) {
  if (stack_ == nullptr) {
    stack_ = map_stack();
    unused_ = next_colour++ % kColours * kColourStep;
  }
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  // What ran here before left red zones: after exit() those of its first frames only.
  const size_t dirty = exited_ ? kFirstFrames : kStackSize;
  __asan_unpoison_memory_region(stack_ + kStackSize - dirty, dirty);
#endif
  exited_ = false;
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack_ + kStackSize - unused_);
  *--top = nullptr;  // no caller; keeps the alignment of a called function
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackSize - unused_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Fiber::resume() {
  void* saved = nullptr;
  announce_switch(&saved, stack_, kStackSize);
#if defined(__x86_64__)
  kelix_simt_switch(&scheduler_context, stack_pointer_);
#else
  swapcontext(&scheduler_context, &context_);
#endif
  finish_switch(saved);
}

void Fiber::suspend() {
  announce_switch(&fake_stack_, scheduler_stack, scheduler_stack_size);
#if defined(__x86_64__)
  kelix_simt_switch(&stack_pointer_, scheduler_context);
#else
  swapcontext(&context_, &scheduler_context);
#endif
  finish_switch(fake_stack_);
}

void Fiber::exit() {
  exited_ = true;
  announce_switch(nullptr, scheduler_stack, scheduler_stack_size);
#if defined(__x86_64__)
  kelix_simt_switch(&stack_pointer_, scheduler_context);
#else
  swapcontext(&context_, &scheduler_context);
#endif
  std::abort();
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
}

}  // namespace simt
