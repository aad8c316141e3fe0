#include "kernels/block_decoder_resident.cuh"
#include "kernels/block_decoder_resident.h"

namespace kelix::cuda {
namespace {

template <class T>
bool launch_resident(const BlockDecoderArgs& args, void* stream) {
  const bool draws_everywhere = args.batch == 1;
  const size_t shared = resident_floats(args, draws_everywhere) * sizeof(float);
  const unsigned ctas = ctas_together(block_decode_kernel<T>, kResidentThreads, shared);
  if (ctas == 0) return false;
  set_zero(args.work.arrived, sizeof(*args.work.arrived), stream);
  return launch_kernel_together(block_decode_kernel<T>, ctas, kResidentThreads, shared, stream,
                                args, draws_everywhere);
}

}  // namespace

bool block_decode_resident(const BlockDecoderArgs& args, void* stream) {
  if (args.batch > kMaxResidentRows) return false;
  bool launched = false;
  with_dtype(args.dtype,
             [&](auto type) { launched = launch_resident<decltype(type)>(args, stream); });
  return launched;
}

}  // namespace kelix::cuda
