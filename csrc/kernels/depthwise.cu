#include "kernels/depthwise.cuh"
#include "kernels/diffusion.h"

namespace kelix::cuda {

const char* depthwise_glu(const DepthwiseGluArgs& args, void* stream) {
  const int64_t ctas = glu_ctas(args);
  if (ctas == 0) return nullptr;
  const bool vectors = args.channels % kGluPiece == 0 && aligned_to_vectors({args.x});
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    launch_kernel(vectors ? depthwise_glu_kernel<T, true> : depthwise_glu_kernel<T, false>,
                  static_cast<unsigned>(ctas), kGluThreads, 0, stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
