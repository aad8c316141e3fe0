// Streams the keys and values of one KV head from the pages through shared memory: a ring of
// kStages stages of kKeyTile keys, filled by cp.async while earlier stages are worked on.
#pragma once

#include "common/async_copy.cuh"
#include "kernels/attention.cuh"

namespace kelix::cuda {

// T: what the cache holds. kDim: elements of a row in shared memory, head_dim and zeros up to a
// multiple of 16. kThreads: of the CTA.
template <class T, int kDim, int kStages, int kThreads>
class KeyStream {
 public:
  using Element = T;
  static constexpr int kDims = kDim;
  // Rows for ldmatrix have an odd number of 16-byte chunks (StageRows); float8 is read in a row.
  static constexpr int kStride = sizeof(T) == 1 ? kDim : kDim + 8;
  static constexpr int kStageSize = 2 * kKeyTile * kStride;
  static constexpr int kRingBytes = kStages * kStageSize * static_cast<int>(sizeof(T));
  using Offsets = int64_t[kStages][kKeyTile];

  // Keys `range` of a request's KV head. `shared`: [kStages * kStageSize].
  __device__ KeyStream(const PagedAttentionArgs& args, int64_t request, int64_t kv_head,
                       const KeyRange& range, T* shared, Offsets& offsets)
      : args_(args),
        pages_(args.page_table + request * args.max_pages),
        kv_head_(kv_head),
        range_(range),
        steps_(static_cast<int>(ceil_div(range.end - range.begin, kKeyTile))),
        shared_(shared),
        offsets_(offsets) {}

  __device__ int steps() const { return steps_; }

  // Fills all stages but one. All threads.
  __device__ void start() {
    for (int step = 0; step < kStages; ++step) place(step, page_of(step));
    __syncthreads();
    for (int step = 0; step < kStages - 1; ++step) issue(step);
  }

  // Waits for the stage of `step`, and starts to fill the one of the step before. All threads.
  __device__ void advance(int step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    issue(step + kStages - 1);
  }

  // The page table runs a step ahead of the copies, in two parts with the step's arithmetic in
  // between, so that nobody waits for it: read the page of this thread's key, note where it is.
  __device__ int page_of(int step) const {
    const int64_t token = token_of(step);
    return threadIdx.x < kKeyTile && token < range_.end ? pages_[token / args_.page_size] : 0;
  }
  __device__ void place(int step, int page) {
    if (threadIdx.x >= kKeyTile) return;
    const int64_t token = token_of(step);
    offsets_[step % kStages][threadIdx.x] =
        token < range_.end ? cache_offset(args_, page, kv_head_, token) : kAbsent;
  }

  // [kKeyTile][kStride]; keys past the range are zero.
  __device__ const T* keys(int step) const { return shared_ + step % kStages * kStageSize; }
  __device__ const T* values(int step) const { return keys(step) + kKeyTile * kStride; }

 private:
  static constexpr int64_t kAbsent = -1;
  static constexpr int kCopyBytes = sizeof(T) == 1 ? kFloat8CopyBytes<kDim> : 16;
  static constexpr int kChunk = kCopyBytes / sizeof(T);  // elements of one copy
  static constexpr int kRowChunks = kDim / kChunk;

  __device__ int64_t token_of(int step) const {
    return range_.begin + static_cast<int64_t>(step) * kKeyTile + threadIdx.x;
  }

  __device__ void issue(int step) {
    if (step < steps_) {
      T* to = shared_ + step % kStages * kStageSize;
#pragma unroll
      for (int i = threadIdx.x; i < kKeyTile * kRowChunks; i += kThreads) {
        const int key = i / kRowChunks;
        const int element = i % kRowChunks * kChunk;
        const int64_t offset = offsets_[step % kStages][key];
        const bool present = offset != kAbsent && element < args_.head_dim;
        const int64_t from = present ? offset + element : 0;
        T* row = to + key * kStride + element;
        copy(row, static_cast<const T*>(args_.k_cache) + from, present);
        copy(row + kKeyTile * kStride, static_cast<const T*>(args_.v_cache) + from, present);
      }
    }
    copy_async_commit();  // an empty group keeps the count that advance() waits by
  }

  // One chunk, zeros where it is absent.
  __device__ static void copy(T* to, const T* from, bool present) {
    if constexpr (kCopyBytes == 16) {
      copy_async_16_zero_fill(to, from, present ? 16 : 0);
    } else {
      copy_async_8_zero_fill(to, from, present ? 8 : 0);
    }
  }

  const PagedAttentionArgs& args_;
  const int32_t* pages_;
  int64_t kv_head_;
  KeyRange range_;
  int steps_;
  T* shared_;
  Offsets& offsets_;
};

}  // namespace kelix::cuda
