#include "kernels/linear.cuh"
#include "kernels/linear.h"

namespace kelix::cuda {
namespace {

template <class T, int kRows>
void launch_tiles(const SkinnyLinearArgs& args, void* stream) {
  const dim3 grid(static_cast<unsigned>((args.out + kSkinnyWarps - 1) / kSkinnyWarps),
                  static_cast<unsigned>((args.rows + kRows - 1) / kRows));
  with_width<T>(args.in, {args.x, args.weight}, [&](auto width) {
    launch_kernel(skinny_linear_kernel<T, kRows, decltype(width)::value>, grid, kSkinnyThreads, 0,
                  stream, args);
  });
}

}  // namespace

const char* skinny_linear(const SkinnyLinearArgs& args, void* stream) {
  if (args.rows * args.out == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.rows == 1 ? launch_tiles<T, 1>(args, stream) : launch_tiles<T, 4>(args, stream);
  });
  return launch_error();
}

}  // namespace kelix::cuda
