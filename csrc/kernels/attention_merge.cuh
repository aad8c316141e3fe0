// Joins what the splits of a context found: one CTA per (unit, query head), a thread per element of
// head_dim, splits in order, so that the result never depends on timing.
#pragma once

#include "kernels/attention.cuh"

namespace kelix::cuda {

template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    paged_attention_merge_kernel(PagedAttentionArgs args) {
  const Unit unit = unit_of(args, blockIdx.x);
  if (!unit.present) return;
  const int64_t head = blockIdx.y;
  const int64_t visible = max(unit.visible, 0);
  const int64_t used = ceil_div(visible, keys_per_split(visible, args.plan.splits));
  float max = -INFINITY;
  for (int64_t split = 0; split < used; ++split) {
    max = fmaxf(max, partial_of(args, split, blockIdx.x, head).max_norm[0]);
  }
  T* out = static_cast<T*>(args.out) + (unit.row * args.num_heads + head) * args.head_dim;
  for (int64_t d = threadIdx.x; d < args.head_dim; d += kAttentionThreads) {
    float norm = 0;
    float sum = 0;
    for (int64_t split = 0; split < used; ++split) {
      const Partial partial = partial_of(args, split, blockIdx.x, head);
      const float weight = share_weight(partial.max_norm[0], max);
      norm += weight * partial.max_norm[1];
      sum += weight * partial.sum[d];
    }
    out[d] = from_float<T>(sum * inverse_or_zero(norm));
  }
}

}  // namespace kelix::cuda
