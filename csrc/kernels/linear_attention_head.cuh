// Attention with ReLU features on the tensor cores: bfloat16, 32 channels a head. A CTA takes one
// head and kStateTokens tokens.
//
// Fragments come straight from global memory, without a shuffle or shared memory: the order of the
// summed index and the names of rows and columns of a product are free, so each lane's loads are
// laid out to be its fragment. With g = lane / 4 and p = lane % 4 a lane
//   of the state loads channels 4 g .. 4 g + 3 of tokens p, p + 4, p + 8, p + 12;
//   of the output loads channels 8 p .. 8 p + 7 of tokens g and g + 8, and stores the same of y.
#pragma once

#include "common/tensor_core.cuh"
#include "kernels/linear_attention.cuh"

namespace kelix::cuda {

inline constexpr int kHeadChannels = 32;
inline constexpr int kHeadFloats = kHeadChannels * (kHeadChannels + 1);  // state and key sum
inline constexpr int kMmaTokens = 16;                                    // rows of A, and its depth

// What one CTA works on.
struct HeadPiece {
  int64_t batch;
  int64_t head;   // of its image
  int64_t piece;  // of its tokens

  // Heads are neighbours in memory, so they are neighbours in the grid.
  __device__ __forceinline__ explicit HeadPiece(const LinearAttentionArgs& args) {
    const auto heads = static_cast<unsigned>(args.heads);
    const auto pieces = static_cast<unsigned>(args.pieces);
    head = blockIdx.x % heads;
    piece = blockIdx.x / heads % pieces;
    batch = blockIdx.x / heads / pieces;
  }

  // The first float of the head's state, of its first piece.
  __device__ __forceinline__ float* state(const LinearAttentionArgs& args) const {
    return args.states + (batch * args.heads + head) * args.pieces * kHeadFloats;
  }

  __device__ __forceinline__ const bf16* part(const LinearAttentionArgs& args, int part,
                                              int64_t token) const {
    return static_cast<const bf16*>(args.qkv) +
           (((batch * args.tokens + token) * 3 + part) * args.heads + head) * kHeadChannels;
  }
};

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const bf16 pair[2] = {from_float<bf16>(low), from_float<bf16>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

__device__ __forceinline__ uint32_t bf16_pair(bf16 low, bf16 high) {
  const bf16 pair[2] = {low, high};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// kCount weights of the norm of one head, ones without norms: a product with one rounds to itself.
template <int kCount>
__device__ __forceinline__ void load_norm(const void* norm, const HeadPiece& at, int channel,
                                          float (&weight)[kCount]) {
  if (norm != nullptr) {
    load_floats(static_cast<const bf16*>(norm) + at.head * kHeadChannels + channel, weight);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) weight[i] = 1.0f;
}

__device__ __forceinline__ float row_scale(const LinearAttentionArgs& args, const HeadPiece& at,
                                           int part, int64_t token) {
  if (args.scales == nullptr || token >= args.tokens) return 1.0f;
  return args.scales[(at.batch * args.tokens + token) * 2 + part];
}

}  // namespace kelix::cuda
