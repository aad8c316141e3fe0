#include "kernels/norm.cuh"
#include "kernels/norm.h"

namespace kelix::cuda {

const char* rms_norm(const RmsNormArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.x, args.residual, args.weight, args.y}, [&](auto width) {
      launch_kernel(rms_norm_kernel<T, decltype(width)::value>, static_cast<unsigned>(args.rows),
                    row_threads(args.cols, decltype(width)::value), 0, stream, args);
    });
  });
  return launch_error();
}

const char* layer_norm(const LayerNormArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.x, args.weight, args.bias, args.y}, [&](auto width) {
      launch_kernel(layer_norm_kernel<T, decltype(width)::value>, static_cast<unsigned>(args.rows),
                    row_threads(args.cols, decltype(width)::value), 0, stream, args);
    });
  });
  return launch_error();
}

}  // namespace kelix::cuda
