#include <algorithm>

#include "kernels/codes.cuh"
#include "kernels/codes.h"
#include "kernels/codes_mma.cuh"

namespace kelix::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the tensor cores may have it. float32 stays with the plain kernel: tensor cores would
// have to compute it as three products in TF32, and their sums do not round as float32 does.
bool takes_tensor_cores(const NearestCodesArgs& args) {
  return args.dtype != DType::kFloat32 && args.dim > 0 && args.dim <= kMmaMaxDim &&
         args.dim % kChunk == 0 && is_aligned(args.z) && is_aligned(args.codebooks) &&
         is_aligned(args.ln_weight) && is_aligned(args.ln_bias);
}

// Parts of a book's codes that make `groups` * parts CTAs take the fewest turns on a device that
// runs `slots` of them at once; a CTA's start costs about as much as kStart tiles.
int best_parts(int64_t groups, int64_t code_tiles, int64_t slots) {
  constexpr int64_t kStart = 2;
  constexpr int64_t kMaxParts = 32;
  int64_t best = 1;
  int64_t least = INT64_MAX;
  for (int64_t parts = 1; parts <= std::min(kMaxParts, code_tiles); ++parts) {
    const int64_t turns = ceil_div(groups * parts, slots);
    const int64_t cost = turns * (ceil_div(code_tiles, parts) + kStart);
    if (cost < least) {
      least = cost;
      best = parts;
    }
  }
  return static_cast<int>(best);
}

template <class T, int kDim>
void launch_mma(const NearestCodesArgs& args, const CodesGrid& grid, void* stream) {
  const auto ctas = static_cast<unsigned>(grid.token_tiles * args.books * grid.parts);
  const auto kernel = args.reference ? nearest_codes_mma_kernel<T, kDim, true>
                                     : nearest_codes_mma_kernel<T, kDim, false>;
  launch_kernel(kernel, ctas, kMmaThreads, sizeof(CodesMmaShared<T, kDim>), stream, args, grid);
}

void nearest_codes_mma(const NearestCodesArgs& args, void* stream) {
  CodesGrid grid{static_cast<int>(ceil_div(args.tokens, kMmaTokens)), 1,
                 static_cast<int>(ceil_div(args.codes, kMmaCodes))};
  grid.parts = best_parts(grid.token_tiles * args.books, grid.code_tiles,
                          static_cast<int64_t>(num_multiprocessors()) * kMmaCtas);
  const auto merge_ctas = static_cast<unsigned>(ceil_div(args.tokens * args.books, kMergeThreads));
  if (grid.parts > 1) {
    launch_kernel(clear_keys_kernel, merge_ctas, kMergeThreads, 0, stream, args);
  }
  const auto launch = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      args.dim <= 64 ? launch_mma<T, 64>(args, grid, stream)
                     : launch_mma<T, 128>(args, grid, stream);
    }
  };
  with_dtype(args.dtype, launch);
  if (grid.parts > 1) {
    launch_kernel(unpack_keys_kernel, merge_ctas, kMergeThreads, 0, stream, args);
  }
}

void nearest_codes_plain(const NearestCodesArgs& args, void* stream) {
  const int64_t ctas = ceil_div(args.tokens, kTokenTile) * args.books;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(nearest_codes_kernel<decltype(type)>, static_cast<unsigned>(ctas), kCodesThreads,
                  0, stream, args);
  });
}

}  // namespace

const char* nearest_codes(const NearestCodesArgs& args, void* stream) {
  if (args.tokens == 0 || args.books == 0) return nullptr;
  if (takes_tensor_cores(args)) {
    nearest_codes_mma(args, stream);
  } else {
    nearest_codes_plain(args, stream);
  }
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
