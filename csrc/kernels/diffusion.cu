#include <algorithm>

#include "kernels/diffusion.cuh"
#include "kernels/diffusion.h"

namespace kelix::cuda {
namespace {

unsigned ctas_for(int64_t threads) {
  return static_cast<unsigned>((threads + kDiffusionThreads - 1) / kDiffusionThreads);
}

// Elementwise kernels loop, so that their grid stays small.
unsigned looping_ctas_for(int64_t elements) {
  return ctas_for(std::min<int64_t>(elements, int64_t{65536} * kDiffusionThreads));
}

}  // namespace

const char* modulate(const ModulateArgs& args, void* stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(modulate_kernel<decltype(type)>, static_cast<unsigned>(rows), kDiffusionThreads,
                  0, stream, args);
  });
  return launch_error();
}

const char* gated_residual(const GatedResidualArgs& args, void* stream) {
  const int64_t total = args.batch * args.tokens * args.cols;
  if (total == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(gated_residual_kernel<decltype(type)>, looping_ctas_for(total), kDiffusionThreads,
                  0, stream, args);
  });
  return launch_error();
}

const char* euler_step(const EulerStepArgs& args, void* stream) {
  const int64_t total = args.batch * args.cols;
  if (total == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(euler_step_kernel<decltype(type)>, looping_ctas_for(total), kDiffusionThreads, 0,
                  stream, args);
  });
  return launch_error();
}

const char* relu_linear_attention(const LinearAttentionArgs& args, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t rows = args.batch * args.tokens;
  const int64_t pieces = args.stride / kTile;
  const int64_t heads = args.batch * args.heads;
  const int64_t tiles = (args.tokens + kTile - 1) / kTile;
  if (rows == 0 || heads == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.q_norm != nullptr) {
      launch_kernel(linear_attention_scales_kernel<T>, static_cast<unsigned>(rows * 2),
                    kDiffusionThreads, 0, on, args);
    }
    launch_kernel(linear_attention_state_kernel<T>, static_cast<unsigned>(heads * pieces * pieces),
                  kDiffusionThreads, 0, on, args);
    launch_kernel(linear_attention_output_kernel<T>, static_cast<unsigned>(heads * tiles * pieces),
                  kDiffusionThreads, 0, on, args);
  });
  return launch_error();
}

const char* depthwise_glu(const DepthwiseGluArgs& args, void* stream) {
  const int64_t strips = (args.height + kStrip - 1) / kStrip;
  const int64_t threads = args.batch * strips * args.width * args.channels;
  if (threads == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(depthwise_glu_kernel<decltype(type)>, ctas_for(threads), kDiffusionThreads, 0,
                  stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
