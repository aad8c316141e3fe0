// Draws from rows too wide for one CTA, in three rounds with all CTAs in step between them:
//   summarise  a CTA per chunk of a row: maximum, sum of exponentials, maxima of groups of columns
//   gather     a CTA per chunk again: the candidates that the filter can keep, or, where no filter
//              asks for all of them at once, the chunk's best score
//   finish     a CTA per row: the draw
// The chunks are the same whoever works on them, and their sums are added in their order.
#pragma once

#include "common/ceil_div.h"
#include "kernels/sampling.cuh"

namespace kelix::cuda {

inline constexpr int kWideChunk = 4096;
inline constexpr int64_t kWidestNarrowRow = 16384;
inline constexpr int kChunkGroups = kDrawThreads / kWarpSize;

__host__ __device__ __forceinline__ bool is_wide(int64_t width) { return width > kWidestNarrowRow; }
__host__ __device__ __forceinline__ int64_t wide_chunks(int64_t width) {
  return ceil_div(width, kWideChunk);
}

// A wide row and what its chunks leave for each other, carved from the row's workspace.
template <class T>
struct WideRow {
  const T* logits;
  float* distance;  // the candidates
  int* column;
  uint64_t* best;   // [chunks] packed: the maximum, or the best score
  uint64_t* mass;   // [chunks] for top-p without top-k
  float* top;       // [chunks] +inf: the chunk has a NaN or +inf
  float* sum;       // [chunks] of exp(logit - top)
  float* tempered;  // [chunks] of exp((logit - top) / temperature)
  float* groups;    // [chunks * kChunkGroups] maxima
  int* count;       // candidates
  int cols, chunks;
};

template <class T>
__device__ __forceinline__ WideRow<T> wide_row(const T* logits, int64_t width, float* workspace) {
  WideRow<T> row;
  row.logits = logits;
  row.cols = static_cast<int>(width);
  row.chunks = static_cast<int>(wide_chunks(width));
  row.distance = workspace;
  row.column = reinterpret_cast<int*>(workspace + width);
  const uintptr_t rest = reinterpret_cast<uintptr_t>(workspace + 2 * width);
  row.best = reinterpret_cast<uint64_t*>((rest + 7) / 8 * 8);
  row.mass = row.best + row.chunks;
  row.top = reinterpret_cast<float*>(row.mass + row.chunks);
  row.sum = row.top + row.chunks;
  row.tempered = row.sum + row.chunks;
  row.groups = row.tempered + row.chunks;
  row.count = reinterpret_cast<int*>(row.groups + row.chunks * kChunkGroups);
  return row;
}

// Calls f(column) for the thread's own columns of a chunk.
template <class F>
__device__ __forceinline__ void for_columns(int chunk, int cols, const F& f) {
  const int end = min(cols, (chunk + 1) * kWideChunk);
  for (int c = chunk * kWideChunk + threadIdx.x; c < end; c += kDrawThreads) f(c);
}

template <class T>
__device__ void summarise_chunk(const WideRow<T>& row, int chunk, const DrawRule& rule,
                                DrawShared& shared) {
  const Filter filter = filter_of(rule, row.cols);
  float top = -INFINITY;
  bool bad = false;
  uint64_t best = 0;
  for_columns(chunk, row.cols, [&](int c) {
    const float v = to_float(row.logits[c]);
    bad |= !(v < INFINITY);  // NaN or +inf
    if (v > top) {
      top = v;
      best = pack_best(v, c);
    }
  });
  const float group = warp_max(top);
  const float peak =
      cta_reduce(bad ? INFINITY : top, shared.floats, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0, tempered = 0;
  if (fabsf(peak) < INFINITY) {
    for_columns(chunk, row.cols, [&](int c) {
      const float below = to_float(row.logits[c]) - peak;
      sum += expf(below);
      tempered += expf(below / filter.temperature);
    });
  }
  sum = cta_sum(sum, shared.floats);
  tempered = cta_sum(tempered, shared.floats);
  best = cta_reduce(best, shared.words, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  if (threadIdx.x % kWarpSize == 0) {
    row.groups[chunk * kChunkGroups + threadIdx.x / kWarpSize] = group;
  }
  if (threadIdx.x != 0) return;
  row.top[chunk] = peak;
  row.sum[chunk] = sum;
  row.tempered[chunk] = tempered;
  row.best[chunk] = best;
  if (chunk == 0) *row.count = 0;
}

template <class T>
__device__ float wide_peak(const WideRow<T>& row, DrawShared& shared) {
  float top = -INFINITY;
  for (int i = threadIdx.x; i < row.chunks; i += kDrawThreads) top = fmaxf(top, row.top[i]);
  return cta_reduce(top, shared.floats, [](float a, float b) { return fmaxf(a, b); });
}

// Sum over the chunks of `sums`, each relative to its chunk's maximum, relative to the row's.
template <class T>
__device__ float wide_sum(const WideRow<T>& row, const float* sums, float peak, float temperature) {
  float total = 0;
  for (int i = 0; i < row.chunks; ++i) {
    total = fmaf(sums[i], expf((row.top[i] - peak) / temperature), total);
  }
  return total;
}

template <class T>
__device__ float wide_limit(const WideRow<T>& row, const DrawRule& rule, const Filter& filter,
                            float peak, DrawShared& shared) {
  if (!filter.by_count) {
    return distance_of_mass(wide_sum(row, row.tempered, peak, filter.temperature), rule.top_p,
                            row.cols);
  }
  float top = -INFINITY;
  for (int i = threadIdx.x; i < row.chunks * kChunkGroups; i += kDrawThreads) {
    top = fmaxf(top, row.groups[i]);
  }
  return distance_of_wanted(top, peak, filter, shared);
}

// Appends the chunk's columns no farther than `limit`: one addition to the row's counter per CTA.
template <class T>
__device__ void append_candidates(const WideRow<T>& row, int chunk, float peak, float temperature,
                                  float limit, DrawShared& shared) {
  const auto distance_of = [&](int c) { return (peak - to_float(row.logits[c])) / temperature; };
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  int mine = 0;
  for_columns(chunk, row.cols, [&](int c) { mine += distance_of(c) <= limit; });
  int at = mine > 0 ? atomic_add(&shared.count, mine) : 0;
  __syncthreads();
  if (threadIdx.x == 0) shared.count = atomic_add(row.count, shared.count);
  __syncthreads();
  at += shared.count;
  for_columns(chunk, row.cols, [&](int c) {
    const float distance = distance_of(c);
    if (!(distance <= limit)) return;
    row.distance[at] = distance;
    row.column[at++] = c;
  });
}

template <class T>
__device__ void gather_chunk(const WideRow<T>& row, int chunk, const DrawRule& rule,
                             DrawShared& shared) {
  const Filter filter = filter_of(rule, row.cols);
  const float peak = wide_peak(row, shared);
  if (!(fabsf(peak) < INFINITY) || filter.greedy) return;
  uint64_t mass = 0, best = 0;
  if (filter.by_count || filter.by_mass) {
    const float limit = wide_limit(row, rule, filter, peak, shared);
    append_candidates(row, chunk, peak, filter.temperature, limit, shared);
  }
  for_columns(chunk, row.cols, [&](int c) {
    const float distance = (peak - to_float(row.logits[c])) / filter.temperature;
    if (filter.by_count) return;
    if (filter.by_mass) {
      mass += mass_of(distance);
    } else if (distance <= kLargestFinite && !below_min_p(distance, filter.min_p)) {
      const uint64_t packed = packed_score(rule, distance, c);
      best = packed > best ? packed : best;
    }
  });
  mass = cta_total(mass, shared);
  best = cta_reduce(best, shared.words, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  if (threadIdx.x != 0) return;
  row.mass[chunk] = mass;
  row.best[chunk] = best;
}

// The same result in every thread.
template <class T>
__device__ Drawn finish_wide_row(const WideRow<T>& row, const DrawRule& rule, DrawShared& shared) {
  const Filter filter = filter_of(rule, row.cols);
  const float peak = wide_peak(row, shared);
  if (!(fabsf(peak) < INFINITY)) return {-1, NAN};
  const float log_sum = logf(wide_sum(row, row.sum, peak, 1.0f));
  uint64_t best = 0, total = 0;
  for (int i = threadIdx.x; i < row.chunks; i += kDrawThreads) {
    best = row.best[i] > best ? row.best[i] : best;
    if (filter.by_mass) total += row.mass[i];
  }
  int64_t column;
  if (!filter.greedy && (filter.by_count || filter.by_mass)) {
    const Candidates found{row.distance, row.column, *row.count};
    total = cta_total(total, shared);
    column = draw_candidate(rule, filter, row.cols, total, found, shared);
  } else {
    column = best_column(best, shared);
  }
  return {rule.first_id + column, to_float(row.logits[column]) - peak - log_sum};
}

template <class T>
__device__ __forceinline__ WideRow<T> wide_row_of(const SampleArgs& args, int64_t r) {
  return wide_row(static_cast<const T*>(args.logits) + r * args.cols, args.cols,
                  args.workspace + r * draw_workspace(args.cols));
}

// Grid of rows * chunks for the first two.
template <class T>
__global__ void __launch_bounds__(kDrawThreads) summarise_kernel(SampleArgs args) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t chunks = wide_chunks(args.cols), r = blockIdx.x / chunks;
  summarise_chunk(wide_row_of<T>(args, r), static_cast<int>(blockIdx.x % chunks),
                  rule_of_row(args, r), shared);
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) gather_kernel(SampleArgs args) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t chunks = wide_chunks(args.cols), r = blockIdx.x / chunks;
  gather_chunk(wide_row_of<T>(args, r), static_cast<int>(blockIdx.x % chunks), rule_of_row(args, r),
               shared);
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) finish_kernel(SampleArgs args) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t r = blockIdx.x;
  store_drawn(args, r, finish_wide_row(wide_row_of<T>(args, r), rule_of_row(args, r), shared));
}

}  // namespace kelix::cuda
