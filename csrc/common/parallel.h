// A parallel loop handed to the CPU kernels that have several phases. It is torch's thread pool
// underneath, but csrc/cpu sees a function pointer only.
#pragma once

#include <cstdint>

namespace kelix {

class ParallelFor {
 public:
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  using Run = void (*)(int64_t size, int64_t grain, Body body, void* context);

  explicit ParallelFor(Run run) : run_(run) {}

  // Calls f(begin, end) on disjoint ranges that cover [0, size); `grain` is the least worth a
  // thread.
  template <class F>
  void operator()(int64_t size, int64_t grain, const F& f) const {
    run_(
        size, grain,
        [](int64_t begin, int64_t end, void* context) {
          (*static_cast<const F*>(context))(begin, end);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  Run run_;
};

}  // namespace kelix
