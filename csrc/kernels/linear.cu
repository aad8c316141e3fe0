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

template <class T, int kRows>
void launch_int8_tiles(const SkinnyLinearArgs& args, void* stream) {
  constexpr int kPerCta = kSkinnyWarps * kInt8Outputs;
  const dim3 grid(static_cast<unsigned>((args.rows + kRows - 1) / kRows),
                  static_cast<unsigned>((args.out + kPerCta - 1) / kPerCta));
  with_width<int8_t>(args.in, {args.x, args.weight}, [&](auto width) {
    launch_kernel(skinny_linear_int8_kernel<T, kRows, decltype(width)::value>, grid, kSkinnyThreads,
                  0, stream, args);
  });
}

template <class T>
void launch_int8(const SkinnyLinearArgs& args, void* stream) {
  if (args.rows == 1) {
    launch_int8_tiles<T, 1>(args, stream);
  } else if (args.rows <= 4) {
    launch_int8_tiles<T, 4>(args, stream);
  } else {
    launch_int8_tiles<T, 8>(args, stream);
  }
}

}  // namespace

const char* skinny_linear(const SkinnyLinearArgs& args, void* stream) {
  if (args.rows * args.out == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.scale != nullptr) return launch_int8<T>(args, stream);
    args.rows == 1 ? launch_tiles<T, 1>(args, stream) : launch_tiles<T, 4>(args, stream);
  });
  return launch_error();
}

}  // namespace kelix::cuda
