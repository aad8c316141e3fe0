#include "kernels/sampling.cuh"
#include "kernels/sampling.h"

namespace kelix::cuda {

const char* sample_blocks(const SampleArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(sample_blocks_kernel<decltype(type)>, args.rows, kDrawThreads, 0, stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
