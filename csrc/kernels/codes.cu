#include <algorithm>

#include "common/ceil_div.h"
#include "common/vector.cuh"
#include "kernels/codes.cuh"
#include "kernels/codes.h"
#include "kernels/codes_cutlass.h"
#include "kernels/codes_hopper.h"
#include "kernels/codes_mma.cuh"

namespace kelix::cuda {
namespace {

// Whether the tensor cores may have it. float32 stays with the plain kernel: tensor cores would
// compute it as three products in TF32, and their sums do not round as float32 does.
bool takes_tensor_cores(const NearestCodesArgs& args) {
  return args.dtype != DType::kFloat32 && args.dim > 0 && args.dim <= codes_mma::kMaxDim &&
         args.dim % kChunk == 0 &&
         aligned_to_vectors({args.z, args.codebooks, args.ln_weight, args.ln_bias});
}

// The form for sm_90a, where it was compiled. Its tile copies count rows in 32 bits.
bool takes_hopper(const NearestCodesArgs& args) {
  return kCodesHopperBuilt && compute_capability() == 90 &&
         args.books * args.codes <= INT32_MAX - kCodesHopperCodes;
}

// Parts of a book's codes that make groups * parts CTAs take the fewest turns on a device that
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

// Tiles of at most `tile_tokens` tokens, a multiple of `step`, as even as that allows.
CodesGrid make_grid(const NearestCodesArgs& args, int tile_tokens, int step, int tile_codes,
                    int ctas_at_once) {
  const int64_t token_tiles = ceil_div(args.tokens, tile_tokens);
  const int64_t even = ceil_div(ceil_div(args.tokens, token_tiles), step) * step;
  const int64_t code_tiles = ceil_div(args.codes, tile_codes);
  return {static_cast<int>(token_tiles), static_cast<int>(even),
          best_parts(token_tiles * args.books, code_tiles, ctas_at_once),
          static_cast<int>(code_tiles)};
}

template <class T, int kDim>
void launch_mma_kernel(const NearestCodesArgs& args, const CodesGrid& grid, void* stream) {
  const auto kernel = args.reference ? codes_mma::nearest_codes_mma_kernel<T, kDim, true>
                                     : codes_mma::nearest_codes_mma_kernel<T, kDim, false>;
  launch_kernel(kernel, static_cast<unsigned>(grid.token_tiles * args.books * grid.parts),
                codes_mma::kThreads, sizeof(codes_mma::Shared<T, kDim>), stream, args, grid);
}

const char* launch_mma(const NearestCodesArgs& args, const CodesGrid& grid, void* stream) {
  const bool narrow = args.dim <= kPanelColumns;
  if (args.dtype == DType::kBFloat16) {
    narrow ? launch_mma_kernel<bf16, 64>(args, grid, stream)
           : launch_mma_kernel<bf16, 128>(args, grid, stream);
  } else {
    narrow ? launch_mma_kernel<f16, 64>(args, grid, stream)
           : launch_mma_kernel<f16, 128>(args, grid, stream);
  }
  return launch_error();
}

// Launches `search` between those that make keys of the indices and indices of the keys.
template <class Search>
const char* merge_keys(const NearestCodesArgs& args, void* stream, const Search& search) {
  const auto ctas = static_cast<unsigned>(ceil_div(args.tokens * args.books, kMergeThreads));
  launch_kernel(clear_keys_kernel, ctas, kMergeThreads, 0, stream, args);
  const char* error = search();
  if (error != nullptr) return error;
  launch_kernel(unpack_keys_kernel, ctas, kMergeThreads, 0, stream, args);
  return launch_error();
}

// One launch, or three where the codes of a book are shared out: their parts meet in the indices.
const char* nearest_codes_tensor(const NearestCodesArgs& args, void* stream) {
  if (num_multiprocessors() == 0) return launch_error();  // the device answers nothing
  const bool hopper = takes_hopper(args);
  const int ctas = num_multiprocessors() * (hopper ? 1 : codes_mma::kCtas);
  const CodesGrid grid =
      hopper ? make_grid(args, kCodesHopperTokens, kCodesHopperGroup, kCodesHopperCodes, ctas)
             : make_grid(args, codes_mma::kTokens, codes_mma::kWarpTokens, codes_mma::kCodes, ctas);
  const auto search = [&] {
    return hopper ? launch_codes_hopper(args, grid, stream) : launch_mma(args, grid, stream);
  };
  return grid.parts > 1 ? merge_keys(args, stream, search) : search();
}

const char* nearest_codes_plain(const NearestCodesArgs& args, void* stream) {
  const int64_t ctas = ceil_div(args.tokens, kTokenTile) * args.books;
  with_dtype(args.dtype, [&](auto type) {
    launch_kernel(nearest_codes_kernel<decltype(type)>, static_cast<unsigned>(ctas), kCodesThreads,
                  0, stream, args);
  });
  return launch_error();
}

}  // namespace

const char* nearest_codes(const NearestCodesArgs& args, void* stream) {
  if (args.tokens == 0 || args.books == 0) return nullptr;
  return takes_tensor_cores(args) ? nearest_codes_tensor(args, stream)
                                  : nearest_codes_plain(args, stream);
}

const char* nearest_codes_cutlass(const NearestCodesArgs& args, void* stream) {
  if (args.tokens == 0 || args.books == 0) return nullptr;
  if (!kCodesCutlassBuilt) return "built without the CUTLASS headers or without sm_90a";
  if (compute_capability() != 90) return "needs a GPU of compute capability 9.0";
  return merge_keys(args, stream, [&] { return launch_codes_cutlass(args, stream); });
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
