// The rows of a stage as the products take them: those of the ring itself, or, where the cache is
// float8, a copy behind the ring in the type of the queries.
#pragma once

#include "common/float8.cuh"
#include "kernels/attention_stream.cuh"

namespace kelix::cuda {

template <class T, class Stream>
class StageRows {
 public:
  static constexpr bool kWidens = !std::is_same_v<T, typename Stream::Element>;
  // An odd number of 16-byte chunks: eight neighbouring rows start in different banks.
  static constexpr int kStride = Stream::kDims + 8;
  // Bytes of dynamic shared memory, the ring's included.
  static constexpr int kShared =
      Stream::kRingBytes + (kWidens ? 2 * kKeyTile * kStride * static_cast<int>(sizeof(T)) : 0);

  // `shared`: [kShared] bytes, the ring first.
  __device__ StageRows(const Stream& stream, typename Stream::Element* shared)
      : stream_(stream),
        wide_(reinterpret_cast<T*>(reinterpret_cast<char*>(shared) + Stream::kRingBytes)) {}

  // Makes keys and values first .. first + kCount of the step's stage, by kThreads threads of which
  // this one is number `thread`. They meet before they read them, and all readers before the next.
  template <int kCount, int kThreads>
  __device__ __forceinline__ void make(int step, int first, int thread) {
    if constexpr (kWidens) {
      widen<kCount, kThreads>(stream_.keys(step), wide_, first, thread);
      widen<kCount, kThreads>(stream_.values(step), wide_ + kKeyTile * kStride, first, thread);
    }
  }

  // [kKeyTile][kStride]
  __device__ const T* keys(int step) const {
    if constexpr (kWidens) {
      return wide_;
    } else {
      return stream_.keys(step);
    }
  }
  __device__ const T* values(int step) const { return keys(step) + kKeyTile * kStride; }

 private:
  // Pieces of eight elements: 8 bytes in, 16 bytes out.
  template <int kCount, int kThreads>
  __device__ __forceinline__ static void widen(const float8* from, T* to, int first, int thread) {
    constexpr int kPieces = Stream::kDims / 8;
#pragma unroll
    for (int i = thread; i < kCount * kPieces; i += kThreads) {
      const int row = first + i / kPieces;
      const int element = i % kPieces * 8;
      const auto raw = *reinterpret_cast<const uint2*>(from + row * Stream::kStride + element);
      *reinterpret_cast<uint4*>(to + row * kStride + element) = {
          pair_of_float8<T>(raw.x), pair_of_float8<T>(raw.x >> 16), pair_of_float8<T>(raw.y),
          pair_of_float8<T>(raw.y >> 16)};
    }
  }

  const Stream& stream_;
  T* wide_;
};

}  // namespace kelix::cuda
