#include "kernels/attention.cuh"
#include "kernels/attention.h"

namespace kelix::cuda {

const char* rope_store_kv(const RopeStoreKvArgs& args, void* stream) {
  const int64_t units = args.num_tokens * (args.num_heads + 2 * args.num_kv_heads);
  if (units == 0) return nullptr;
  constexpr int64_t kWarps = kRopeThreads / kWarpSize;
  const auto ctas = static_cast<unsigned>((units + kWarps - 1) / kWarps);
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(rope_store_kv_kernel<decltype(type)>, ctas, kRopeThreads, 0, stream, args);
  });
  return launch_error();
}

namespace {

template <class T, int kPerLane>
void launch_paged_attention(const PagedAttentionArgs& args, cudaStream_t stream) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t tiles = (group + kHeadTile - 1) / kHeadTile;
  const dim3 grid(static_cast<unsigned>(args.num_rows),
                  static_cast<unsigned>(args.num_kv_heads * tiles));
  launch_kernel(paged_attention_kernel<T, kPerLane>, grid, kAttentionThreads, 0, stream, args);
}

}  // namespace

const char* paged_attention(const PagedAttentionArgs& args, void* stream) {
  if (args.num_rows == 0 || args.batch == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.head_dim <= 32) {
      launch_paged_attention<T, 1>(args, queue);
    } else if (args.head_dim <= 64) {
      launch_paged_attention<T, 2>(args, queue);
    } else if (args.head_dim <= 128) {
      launch_paged_attention<T, 4>(args, queue);
    } else {
      launch_paged_attention<T, 8>(args, queue);
    }
  });
  return launch_error();
}

}  // namespace kelix::cuda
