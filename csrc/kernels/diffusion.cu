#include "kernels/diffusion.cuh"
#include "kernels/diffusion.h"

namespace kelix::cuda {

const char* modulate(const ModulateArgs& args, void* stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.x, args.shift, args.scale, args.y}, [&](auto width) {
      launch_kernel(modulate_kernel<T, decltype(width)::value>, static_cast<unsigned>(rows),
                    row_threads(args.cols, decltype(width)::value), 0, stream, args);
    });
  });
  return launch_error();
}

const char* gated_residual(const GatedResidualArgs& args, void* stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.x, args.gate, args.y}, [&](auto width) {
      launch_kernel(gated_residual_kernel<T, decltype(width)::value>, static_cast<unsigned>(rows),
                    row_threads(args.cols, decltype(width)::value), 0, stream, args);
    });
  });
  return launch_error();
}

const char* euler_step(const EulerStepArgs& args, void* stream) {
  if (args.batch * args.cols == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.latent, args.velocity, args.uncond}, [&](auto width) {
      const PieceGrid pieces = piece_grid(args.batch, args.cols, decltype(width)::value);
      launch_kernel(euler_step_kernel<T, decltype(width)::value>, pieces.grid, pieces.block, 0,
                    stream, args);
    });
  });
  return launch_error();
}

}  // namespace kelix::cuda
