#include "kernels/sampling.h"
#include "kernels/sampling_wide.cuh"

namespace kelix::cuda {
namespace {

template <class T>
void sample_wide(const SampleArgs& args, void* stream) {
  const auto rows = static_cast<unsigned>(args.rows);
  const auto chunks = static_cast<unsigned>(args.rows * wide_chunks(args.cols));
  launch_kernel(summarise_kernel<T>, chunks, kDrawThreads, 0, stream, args);
  launch_kernel(gather_kernel<T>, chunks, kDrawThreads, 0, stream, args);
  launch_kernel(finish_kernel<T>, rows, kDrawThreads, 0, stream, args);
}

}  // namespace

const char* sample_blocks(const SampleArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (is_wide(args.cols)) {
      sample_wide<T>(args, stream);
    } else {
      const auto rows = static_cast<unsigned>(args.rows);
      launch_kernel(sample_blocks_kernel<T>, rows, kDrawThreads, 0, stream, args);
    }
  });
  return launch_error();
}

}  // namespace kelix::cuda
