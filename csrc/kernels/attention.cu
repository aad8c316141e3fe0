#include "kernels/attention.h"
#include "kernels/attention_decode.cuh"
#include "kernels/attention_lanes.cuh"
#include "kernels/attention_merge.cuh"
#include "kernels/attention_prefill.cuh"

namespace kelix::cuda {
namespace {

// CTAs of the units, and those of the merge.
dim3 unit_grid(const PagedAttentionArgs& args) {
  return {static_cast<unsigned>(args.plan.units),
          static_cast<unsigned>(args.num_kv_heads * head_tiles(args)),
          static_cast<unsigned>(args.plan.splits)};
}
dim3 merge_grid(const PagedAttentionArgs& args) {
  return {static_cast<unsigned>(args.plan.units), static_cast<unsigned>(args.num_heads)};
}

template <class T, class Cache>
void launch_lanes(const PagedAttentionArgs& args, cudaStream_t stream) {
  constexpr int kWide = std::is_same_v<Cache, float8> ? 8 : 16 / sizeof(T);
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, unit_grid(args), kAttentionThreads, 0, stream, args);
  };
  if (args.plan.wide && args.head_dim <= kWarpSize * kWide) {
    launch(paged_attention_lanes_kernel<T, Cache, kWide, 1>);
  } else {  // too rare for a kernel per size
    launch(paged_attention_lanes_kernel<T, Cache, 1, 8>);
  }
}

// 8.6, 8.9 and 12.x give a CTA 99 KB of shared memory; 8.0, 9.0 and 10.x 163 KB or more.
bool has_little_shared() {
  const int capability = compute_capability();
  return capability == 86 || capability == 89 || capability / 10 == 12;
}

template <class T, class Cache, int kDim, int kStages>
void launch_decode(const PagedAttentionArgs& args, cudaStream_t stream) {
  launch_kernel(paged_attention_decode_kernel<T, Cache, kDim, kStages>, unit_grid(args),
                kAttentionThreads, kDecodeShared<T, Cache, kDim, kStages>, stream, args);
}

template <class T, class Cache, int kDim>
void launch_tiles(const PagedAttentionArgs& args, cudaStream_t stream) {
  if (args.plan.units > 0) {
    constexpr int kShared = kDecodeStaticShared + kDecodeShared<T, Cache, kDim, kDecodeStages>;
    if constexpr (kShared > kLittleShared) {
      has_little_shared() ? launch_decode<T, Cache, kDim, kFewDecodeStages>(args, stream)
                          : launch_decode<T, Cache, kDim, kDecodeStages>(args, stream);
    } else {
      launch_decode<T, Cache, kDim, kDecodeStages>(args, stream);
    }
  }
  if (args.plan.unit_is_request) {
    const dim3 grid(static_cast<unsigned>(prefill_tiles(args)),
                    static_cast<unsigned>(args.num_kv_heads));
    launch_kernel(paged_attention_prefill_kernel<T, Cache, kDim>, grid, kPrefillThreads,
                  kPrefillShared<T, Cache, kDim>, stream, args);
  }
}

template <class T, class Cache>
void launch_attention(const PagedAttentionArgs& args, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (args.plan.tiles) {
      if (args.head_dim <= 64) return launch_tiles<T, Cache, 64>(args, stream);
      if (args.head_dim <= kMiddleTileDim) {
        return launch_tiles<T, Cache, kMiddleTileDim>(args, stream);
      }
      return launch_tiles<T, Cache, kMaxTileDim>(args, stream);
    }
  }
  launch_lanes<T, Cache>(args, stream);
}

}  // namespace

const char* paged_attention(const PagedAttentionArgs& args, void* stream) {
  if (args.num_rows == 0 || args.batch == 0 || args.num_heads == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.float8_cache ? launch_attention<T, float8>(args, queue)
                      : launch_attention<T, T>(args, queue);
    if (args.plan.splits > 1 && args.plan.units > 0) {
      launch_kernel(paged_attention_merge_kernel<T>, merge_grid(args), kAttentionThreads, 0, queue,
                    args);
    }
  });
  return launch_error();
}

}  // namespace kelix::cuda
