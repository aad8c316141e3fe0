// What the tensor-core forms of nearest_codes share: tiles of 16-bit rows in shared memory, the
// LayerNorm of a token in such a tile, the nearest code so far, and the merge of the parts that
// several CTAs found.
#pragma once

#include "common/async_copy.cuh"
#include "common/codes.h"
#include "common/device.cuh"

namespace kelix::cuda {

// How a launch shares its work out: a CTA takes one tile of tokens, one book and one part of the
// book's codes.
struct CodesGrid {
  int token_tiles;
  int tile_tokens;  // as many as the kernel takes, or fewer
  int parts;
  int code_tiles;  // of the whole book
};

// What of it the CTA takes. Neighbouring CTAs share their codes, for the L2 cache's sake.
struct CtaWork {
  int64_t first_token;  // tokens [first_token, end_token)
  int64_t end_token;
  int64_t book;
  int begin;  // tiles of codes [begin, end)
  int end;
};

__device__ __forceinline__ CtaWork work_of_cta(const NearestCodesArgs& args,
                                               const CodesGrid& grid) {
  const int64_t token_tile = blockIdx.x % grid.token_tiles;
  const int64_t part = blockIdx.x / grid.token_tiles % grid.parts;
  const int64_t first_token = token_tile * grid.tile_tokens;
  const int64_t end_token = first_token + grid.tile_tokens;
  return {first_token, end_token < args.tokens ? end_token : args.tokens,
          blockIdx.x / grid.token_tiles / grid.parts,
          static_cast<int>(grid.code_tiles * part / grid.parts),
          static_cast<int>(grid.code_tiles * (part + 1) / grid.parts)};
}

inline constexpr int kChunk = 8;          // elements in 16 bytes
inline constexpr int kPanelColumns = 64;  // 128 bytes, the width that TMA and wgmma swizzle

// Element offset of a 16-byte chunk in a tile of kRows rows. Columns lie in panels of 64; within a
// panel the chunks of a row are swapped by its number, so that eight rows fall on all the banks.
template <int kRows>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return chunk / 8 * (kRows * kPanelColumns) + row * kPanelColumns +
         ((chunk % 8) ^ (row % 8)) * kChunk;
}

// Starts the copy of rows [first, end) of a matrix with `dim` columns, `stride` apart, padded with
// zeros to kRows rows and kDim columns.
template <int kRows, int kDim, int kThreads, class T>
__device__ __forceinline__ void copy_rows(const T* matrix, int64_t first, int64_t end,
                                          int64_t stride, int dim, T* tile) {
  constexpr int kChunks = kDim / kChunk;
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const bool inside = first + row < end && chunk * kChunk < dim;
    const T* from = inside ? matrix + (first + row) * stride + chunk * kChunk : matrix;
    copy_async_16_zero_fill(tile + tile_offset<kRows>(row, chunk), from, inside ? 16 : 0);
  }
}

// Calls f(i, chunk, values) for the chunks of one row; `f` may change the values.
template <int kRows, class T, class F>
__device__ __forceinline__ void for_chunks(const T* tile, int row, int dim, const F& f) {
  for (int chunk = 0; chunk < dim / kChunk; ++chunk) {
    T values[kChunk];
    load_16_bytes(tile + tile_offset<kRows>(row, chunk), values);
    f(chunk, values);
  }
}

__device__ __forceinline__ float sum_of(const float (&parts)[kChunk]) {
  return ((parts[0] + parts[1]) + (parts[2] + parts[3])) +
         ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// LayerNorm of one row of a tile in place, rounded to T. A thread takes a row: all rows at once,
// and no lane waits for another.
template <int kRows, class T>
__device__ __forceinline__ void norm_row(const NearestCodesArgs& args, int64_t book, int row,
                                         T* tile) {
  const int dim = static_cast<int>(args.dim);
  const T* gains = static_cast<const T*>(args.ln_weight) + book * dim;
  const T* shifts = static_cast<const T*>(args.ln_bias) + book * dim;
  float sums[kChunk] = {};
  for_chunks<kRows>(tile, row, dim, [&](int, const T(&z)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums[i] += to_float(z[i]);
  });
  const float mean = sum_of(sums) / dim;
  float squares[kChunk] = {};
  for_chunks<kRows>(tile, row, dim, [&](int, const T(&z)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float v = to_float(z[i]) - mean;
      squares[i] += v * v;
    }
  });
  const float scale = rsqrtf(sum_of(squares) / dim + args.eps);
  for_chunks<kRows>(tile, row, dim, [&](int chunk, T(&z)[kChunk]) {
    T gain[kChunk];
    T shift[kChunk];
    load_16_bytes(gains + chunk * kChunk, gain);
    load_16_bytes(shifts + chunk * kChunk, shift);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      z[i] =
          from_float<T>((to_float(z[i]) - mean) * scale * to_float(gain[i]) + to_float(shift[i]));
    }
    store_16_bytes(tile + tile_offset<kRows>(row, chunk), z);
  });
}

// |row|^2 as the reference rounds it.
template <int kRows, class T>
__device__ __forceinline__ float rounded_square(const T* tile, int row, int dim) {
  float squares[kChunk] = {};
  for_chunks<kRows>(tile, row, dim, [&](int, const T(&z)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) squares[i] += round_to<T>(to_float(z[i]) * to_float(z[i]));
  });
  return round_to<T>(sum_of(squares));
}

// The tokens of a CTA as a tile, normalised, and their norms. All kThreads threads take part and
// must meet before they read the tile.
template <int kRows, int kDim, int kThreads, bool kReference, class T>
__device__ __forceinline__ void prepare_tokens(const NearestCodesArgs& args, const CtaWork& work,
                                               T* tile, float* token_norms) {
  const int dim = static_cast<int>(args.dim);
  copy_rows<kRows, kDim, kThreads>(static_cast<const T*>(args.z) + work.book * dim,
                                   work.first_token, work.end_token, args.books * dim, dim, tile);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  for (int row = threadIdx.x; row < work.end_token - work.first_token; row += kThreads) {
    if (args.ln_weight != nullptr) norm_row<kRows>(args, work.book, row, tile);
    if (kReference) token_norms[row] = rounded_square<kRows>(tile, row, dim);
  }
}

// The distance of the reference from its unrounded square. Rising, but not strictly.
template <class T>
__device__ __forceinline__ float rounded_distance(float square) {
  const float r = round_to<T>(square);
  // Not fmaxf: it would turn NaN into a distance of zero.
  const float u = round_to<T>(sqrtf(r < 0.0f ? 0.0f : r));
  return round_to<T>(u * u);
}

// The nearest code that a thread has seen of one token. Codes come in rising order.
template <class T, bool kReference>
struct NearestCode {
  float score = INFINITY;     // the smallest so far, of all lanes of the token
  float distance = INFINITY;  // what is compared: in the reference its roundings make ties
  int code = 0;

  static __device__ __forceinline__ float distance_of(float score) {
    return kReference ? rounded_distance<T>(score) : score;
  }

  // Two instructions a score, for nothing larger than the smallest score can be nearer, and a
  // closer look in the few cases where there is something smaller. NaN never is.
  template <int kCount, class CodeOf>
  __device__ __forceinline__ void offer(const float (&scores)[kCount], const CodeOf& code_of) {
    float smallest = scores[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) smallest = fminf(smallest, scores[i]);
    if (!(smallest < score)) return;
    score = smallest;
    const float nearest = distance_of(smallest);
    if (!(nearest < distance)) return;
    distance = nearest;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      if (distance_of(scores[i]) == nearest) code = code_of(i);
    }
  }

  // The four lanes of a token need only look for what beats the best of them all.
  __device__ __forceinline__ void share() {
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) score = fminf(score, shuffle_xor(score, offset));
  }

  // Unsigned order of the keys: nearest first, then the lowest index.
  __device__ __forceinline__ uint64_t key() const {
    const uint32_t bits = bits_of_float(distance + 0.0f);  // -0 becomes 0: they are equal
    const uint32_t ordered = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(code);
  }
};

__device__ __forceinline__ uint64_t smallest_of_four_lanes(uint64_t key) {
#pragma unroll
  for (int offset = 1; offset < 4; offset *= 2) {
    const uint64_t other = shuffle_xor(key, offset);
    key = other < key ? other : key;
  }
  return key;
}

// The index of a token of the tile from the keys of four neighbouring lanes. Where other CTAs hold
// other parts of the codes, the key waits in the place of the index.
__device__ __forceinline__ void store_nearest(const NearestCodesArgs& args, const CodesGrid& grid,
                                              const CtaWork& work, int row, uint64_t key) {
  key = smallest_of_four_lanes(key);
  const int64_t token = work.first_token + row;
  if (threadIdx.x % 4 != 0 || token >= work.end_token) return;
  int64_t* index = args.indices + token * args.books + work.book;
  if (grid.parts == 1) {
    *index = static_cast<uint32_t>(key);
  } else {
    atomic_min(reinterpret_cast<uint64_t*>(index), key);
  }
}

}  // namespace kelix::cuda
