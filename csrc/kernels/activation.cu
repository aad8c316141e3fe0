#include <algorithm>

#include "kernels/activation.cuh"
#include "kernels/activation.h"

namespace kelix::cuda {

const char* silu_mul(const SiluMulArgs& args, void* stream) {
  const int64_t total = args.rows * args.cols;
  if (total == 0) return nullptr;
  const int64_t ctas =
      std::min<int64_t>((total + kActivationThreads - 1) / kActivationThreads, 65536);
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(silu_mul_kernel<decltype(type)>, static_cast<unsigned>(ctas), kActivationThreads,
                  0, stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
