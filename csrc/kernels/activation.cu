#include "kernels/activation.cuh"
#include "kernels/activation.h"

namespace kelix::cuda {

const char* silu_mul(const SiluMulArgs& args, void* stream) {
  if (args.rows * args.cols == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.cols, {args.x, args.y}, [&](auto width) {
      const PieceGrid pieces = piece_grid(args.rows, args.cols, decltype(width)::value);
      launch_kernel(silu_mul_kernel<T, decltype(width)::value>, pieces.grid, pieces.block, 0,
                    stream, args);
    });
  });
  return launch_error();
}

}  // namespace kelix::cuda
