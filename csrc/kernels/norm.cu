#include "kernels/norm.cuh"
#include "kernels/norm.h"

namespace kelix::cuda {

const char* rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(rms_norm_kernel<decltype(type)>, args.rows, kNormThreads, 0, stream, args);
  });
  return launch_error();
}

const char* layer_norm(const LayerNormArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(layer_norm_kernel<decltype(type)>, args.rows, kNormThreads, 0, stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
