// RoPE with the cache write. A head lies across `width` lanes, each with the same piece of both
// halves, so that a warp takes 32 / width heads of a token and reads them once.
#pragma once

#include "common/attention.h"
#include "common/device.cuh"
#include "common/float8.cuh"
#include "common/host_device.h"
#include "common/vector.cuh"

namespace kelix::cuda {

inline constexpr int kRopeThreads = 128;
inline constexpr int kRopeHalf = 128;  // largest head_dim / 2

// Elements of a piece: 16 bytes where half a head is made of such pieces.
template <class T>
inline constexpr int kRopeVector = 16 / sizeof(T);

// Lanes of a head, a power of two.
KELIX_HOST_DEVICE constexpr int rope_width(int64_t head_dim, int vector) {
  int width = 1;
  while (width < kWarpSize && width * vector < head_dim / 2) width *= 2;
  return width;
}

// What becomes of one head: where it goes, and which norm it takes.
template <class T, class Cache>
struct RopeHead {
  T* query;         // null: not one
  Cache* in_cache;  // null: not stored
  const T* weight;
  bool rotated;

  __device__ RopeHead(const RopeStoreKvArgs& args, int64_t token, int64_t head)
      : query(nullptr), in_cache(nullptr), weight(nullptr), rotated(true) {
    if (head < args.num_heads) {
      query = static_cast<T*>(args.q) + (token * args.num_heads + head) * args.head_dim;
      weight = static_cast<const T*>(args.q_weight);
      return;
    }
    const int64_t slot = args.slots[token];
    if (slot < 0) return;
    rotated = head < args.num_heads + args.num_kv_heads;
    if (rotated) weight = static_cast<const T*>(args.k_weight);
    const int64_t kv_head = (head - args.num_heads) % args.num_kv_heads;
    const int64_t row = (slot / args.page_size * args.num_kv_heads + kv_head) * args.page_size +
                        slot % args.page_size;
    in_cache = static_cast<Cache*>(rotated ? args.k_cache : args.v_cache) + row * args.head_dim;
  }

  __device__ bool is_wanted() const { return query != nullptr || in_cache != nullptr; }

  template <int kVector>
  __device__ __forceinline__ void store(int at, const T (&from)[kVector]) const {
    if constexpr (std::is_same_v<T, Cache>) {
      store_vector((query != nullptr ? query : in_cache) + at, from);
    } else if (query != nullptr) {
      store_vector(query + at, from);
    } else {
      Cache narrow[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) narrow[i] = from_float<Cache>(to_float(from[i]));
      store_vector(in_cache + at, narrow);
    }
  }
};

// Norms, where there is a weight, and rotates a piece of both halves in place.
template <class T, int kVector>
__device__ __forceinline__ void rotate(T (&first)[kVector], T (&second)[kVector], const T* weight,
                                       float scale, const float* cos_sin, int at, int half) {
  float cos[kVector];
  float sin[kVector];
  load_vector(cos_sin + at, cos);
  load_vector(cos_sin + half + at, sin);
  T weights[2][kVector];
  if (weight != nullptr) {
    load_vector(weight + at, weights[0]);
    load_vector(weight + half + at, weights[1]);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    float a = to_float(first[i]);
    float b = to_float(second[i]);
    if (weight != nullptr) {
      a = round_to<T>(round_to<T>(a * scale) * to_float(weights[0][i]));
      b = round_to<T>(round_to<T>(b * scale) * to_float(weights[1][i]));
    }
    first[i] = from_float<T>(a * cos[i] - b * sin[i]);
    second[i] = from_float<T>(b * cos[i] + a * sin[i]);
  }
}

template <class T, class Cache, int kVector>
__global__ void __launch_bounds__(kRopeThreads) rope_store_kv_kernel(RopeStoreKvArgs args) {
  // Pieces of a lane: one, but for single elements of a long head.
  constexpr int kPieces = kRopeHalf > kWarpSize * kVector ? kRopeHalf / (kWarpSize * kVector) : 1;
  const int width = rope_width(args.head_dim, kVector);
  const int64_t all_heads = args.num_heads + 2 * args.num_kv_heads;
  const int64_t unit = (static_cast<int64_t>(blockIdx.x) * kRopeThreads + threadIdx.x) / width;
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int half = static_cast<int>(args.head_dim / 2);
  // Lanes without a head stay for the sums of their warp.
  const bool present = unit < args.num_tokens * all_heads;
  const int64_t token = present ? unit / all_heads : 0;
  const RopeHead<T, Cache> head(args, token, present ? unit % all_heads : 0);
  const T* x = static_cast<const T*>(args.qkv) + (present ? unit : 0) * args.head_dim;

  T raw[2][kPieces][kVector];
  float square_sum = 0;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int at = (piece * width + lane) * kVector;
    if (at >= half) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load_vector(x + side * half + at, raw[side][piece]);
#pragma unroll
      for (const T& v : raw[side][piece]) square_sum += to_float(v) * to_float(v);
    }
  }
  for (int offset = width / 2; offset > 0; offset /= 2) {
    square_sum += shuffle_xor(square_sum, offset);
  }
  if (!present || !head.is_wanted()) return;
  const float scale = rsqrtf(square_sum / args.head_dim + args.eps);
  const float* cos_sin = args.cos_sin + args.positions[token] * args.head_dim;

#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int at = (piece * width + lane) * kVector;
    if (at >= half) continue;
    if (head.rotated) {
      rotate<T, kVector>(raw[0][piece], raw[1][piece], head.weight, scale, cos_sin, at, half);
    }
    head.store(at, raw[0][piece]);
    head.store(half + at, raw[1][piece]);
  }
}

}  // namespace kelix::cuda
