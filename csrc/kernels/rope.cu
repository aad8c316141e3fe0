#include "common/ceil_div.h"
#include "common/vector.cuh"
#include "kernels/attention.h"
#include "kernels/rope.cuh"

namespace kelix::cuda {
namespace {

template <class T, class Cache, int kVector>
void launch_rope(const RopeStoreKvArgs& args, void* stream) {
  const int64_t units = args.num_tokens * (args.num_heads + 2 * args.num_kv_heads);
  const int64_t per_cta = kRopeThreads / rope_width(args.head_dim, kVector);
  const auto ctas = static_cast<unsigned>(ceil_div(units, per_cta));
  launch_kernel(rope_store_kv_kernel<T, Cache, kVector>, ctas, kRopeThreads, 0, stream, args);
}

// Whether every row can be read and written in pieces of `vector` elements.
bool fits_vector(const RopeStoreKvArgs& args, int vector) {
  return args.head_dim / 2 % vector == 0 &&
         aligned_to_vectors({args.qkv, args.q_weight, args.k_weight, args.cos_sin, args.k_cache,
                             args.v_cache, args.q});
}

template <class T, class Cache>
void launch_rope(const RopeStoreKvArgs& args, void* stream) {
  if (fits_vector(args, kRopeVector<T>)) {
    launch_rope<T, Cache, kRopeVector<T>>(args, stream);
  } else {
    launch_rope<T, Cache, 1>(args, stream);
  }
}

}  // namespace

const char* rope_store_kv(const RopeStoreKvArgs& args, void* stream) {
  if (args.num_tokens * (args.num_heads + 2 * args.num_kv_heads) == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.float8_cache ? launch_rope<T, float8>(args, stream) : launch_rope<T, T>(args, stream);
  });
  return launch_error();
}

}  // namespace kelix::cuda
