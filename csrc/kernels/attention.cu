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

template <class T>
void launch_lanes(const PagedAttentionArgs& args, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  const auto launch = [&](auto kernel) {
    launch_kernel(kernel, unit_grid(args), kAttentionThreads, 0, stream, args);
  };
  if (args.plan.wide && args.head_dim <= kWarpSize * kWide) {
    launch(paged_attention_lanes_kernel<T, kWide, 1>);
  } else if (args.head_dim <= 32) {
    launch(paged_attention_lanes_kernel<T, 1, 1>);
  } else if (args.head_dim <= 64) {
    launch(paged_attention_lanes_kernel<T, 1, 2>);
  } else if (args.head_dim <= 128) {
    launch(paged_attention_lanes_kernel<T, 1, 4>);
  } else {
    launch(paged_attention_lanes_kernel<T, 1, 8>);
  }
}

template <class T, int kDim>
void launch_tiles(const PagedAttentionArgs& args, cudaStream_t stream) {
  if (args.plan.units > 0) {
    launch_kernel(paged_attention_decode_kernel<T, kDim>, unit_grid(args), kAttentionThreads,
                  kDecodeShared<T, kDim>, stream, args);
  }
  if (args.plan.unit_is_request) {
    const dim3 grid(static_cast<unsigned>(prefill_tiles(args)),
                    static_cast<unsigned>(args.num_kv_heads));
    launch_kernel(paged_attention_prefill_kernel<T, kDim>, grid, kPrefillThreads,
                  kPrefillShared<T, kDim>, stream, args);
  }
}

template <class T>
void launch_tiles(const PagedAttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim <= 64) {
    launch_tiles<T, 64>(args, stream);
  } else if (args.head_dim <= 80) {
    launch_tiles<T, 80>(args, stream);
  } else {
    launch_tiles<T, kMaxTileDim>(args, stream);
  }
}

}  // namespace

const char* paged_attention(const PagedAttentionArgs& args, void* stream) {
  if (args.num_rows == 0 || args.batch == 0) return nullptr;
  const auto queue = static_cast<cudaStream_t>(stream);
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (args.plan.tiles) {
        launch_tiles<T>(args, queue);
      } else {
        launch_lanes<T>(args, queue);
      }
    } else {
      launch_lanes<T>(args, queue);
    }
    if (args.plan.splits > 1 && args.plan.units > 0) {
      launch_kernel(paged_attention_merge_kernel<T>, merge_grid(args), kAttentionThreads, 0, queue,
                    args);
    }
  });
  return launch_error();
}

}  // namespace kelix::cuda
