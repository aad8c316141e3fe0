#include "common/ceil_div.h"
#include "kernels/diffusion.h"
#include "kernels/linear_attention.cuh"
#include "kernels/linear_attention_output_bf16.cuh"
#include "kernels/linear_attention_state_bf16.cuh"

namespace kelix::cuda {
namespace {

void find_scales(const LinearAttentionArgs& args, void* stream) {
  const int64_t ctas = ceil_div(args.batch * args.tokens * 2, kScaleRows);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    with_width<T>(args.heads * args.head_dim, {args.qkv}, [&](auto width) {
      launch_kernel(linear_attention_scales_kernel<T, decltype(width)::value>,
                    static_cast<unsigned>(ctas), kLinearAttentionThreads, 0, stream, args);
    });
  });
}

void attend(const LinearAttentionArgs& args, void* stream) {
  const int64_t heads = args.batch * args.heads;
  const int64_t squares = args.stride / kTile;
  const int64_t tiles = ceil_div(args.tokens, kTile);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    launch_kernel(linear_attention_state_kernel<T>,
                  static_cast<unsigned>(heads * args.pieces * squares * squares),
                  kLinearAttentionThreads, 0, stream, args);
    launch_kernel(linear_attention_output_kernel<T>, static_cast<unsigned>(heads * tiles * squares),
                  kLinearAttentionThreads, 0, stream, args);
  });
}

void attend_bf16(const LinearAttentionArgs& args, void* stream) {
  const auto ctas = static_cast<unsigned>(args.batch * args.heads * args.pieces);
  launch_kernel(linear_attention_state_bf16_kernel, ctas, kLinearAttentionThreads, 0, stream, args);
  launch_kernel(linear_attention_output_bf16_kernel, ctas, kOutputThreads, 0, stream, args);
}

}  // namespace

const char* relu_linear_attention(const LinearAttentionArgs& args, void* stream) {
  if (args.batch * args.tokens * args.heads == 0) return nullptr;
  if (args.scales != nullptr) find_scales(args, stream);
  if (args.dtype == DType::kBFloat16 && args.head_dim == kHeadChannels &&
      aligned_to_vectors({args.qkv, args.q_norm, args.k_norm, args.y})) {
    attend_bf16(args, stream);
  } else {
    attend(args, stream);
  }
  return launch_error();
}

}  // namespace kelix::cuda
