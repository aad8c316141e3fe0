#include "kernels/codes.cuh"
#include "kernels/codes.h"

namespace kelix::cuda {

const char* nearest_codes(const NearestCodesArgs& args, void* stream) {
  const int64_t ctas = (args.tokens + kTokenTile - 1) / kTokenTile * args.books;
  if (ctas == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(nearest_codes_kernel<decltype(type)>, static_cast<unsigned>(ctas), kCodesThreads,
                  0, stream, args);
  });
  return launch_error();
}

const char* block_embed(const BlockEmbedArgs& args, void* stream) {
  if (args.rows == 0) return nullptr;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(block_embed_kernel<decltype(type)>, static_cast<unsigned>(args.rows),
                  kCodesThreads, 0, stream, args);
  });
  return launch_error();
}

}  // namespace kelix::cuda
