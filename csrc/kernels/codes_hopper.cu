#include "kernels/codes_hopper.cuh"
#include "kernels/codes_hopper.h"

namespace kelix::cuda {
namespace {

static_assert(kCodesHopperTokens == codes_hopper::kTokens &&
              kCodesHopperGroup == codes_hopper::kGroupTokens &&
              kCodesHopperCodes == codes_hopper::kCodes);

template <class T, int kDim>
const char* launch(const NearestCodesArgs& args, const CodesGrid& grid, void* stream) {
  TensorMap map;
  if (!make_tensor_map(&map, static_cast<const T*>(args.codebooks), args.books * args.codes,
                       args.dim, codes_hopper::kCodes)) {
    return "the driver refused the tensor map of the codebooks";
  }
  const auto kernel = args.reference ? codes_hopper::nearest_codes_hopper_kernel<T, kDim, true>
                                     : codes_hopper::nearest_codes_hopper_kernel<T, kDim, false>;
  launch_kernel(kernel, static_cast<unsigned>(grid.token_tiles * args.books * grid.parts),
                codes_hopper::kThreads, sizeof(codes_hopper::Shared<T, kDim>), stream, args, grid,
                map);
  return launch_error();
}

}  // namespace

const char* launch_codes_hopper(const NearestCodesArgs& args, const CodesGrid& grid, void* stream) {
  const bool narrow = args.dim <= kPanelColumns;
  if (args.dtype == DType::kBFloat16) {
    return narrow ? launch<bf16, 64>(args, grid, stream) : launch<bf16, 128>(args, grid, stream);
  }
  return narrow ? launch<f16, 64>(args, grid, stream) : launch<f16, 128>(args, grid, stream);
}

}  // namespace kelix::cuda
