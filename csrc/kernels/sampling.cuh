// Draws one id from one row of logits, a CTA per row (wider rows: sampling_wide.cuh). Nothing is
// sorted: every rule keeps the candidates down to some distance below the maximum. That distance is
// found by ranks among a few candidates, else by bisection over the bits of a float. Counts and
// masses are integers, so that no result depends on the order in which threads add or append.
#pragma once

#include "common/device.cuh"
#include "common/philox.h"
#include "common/sampling.h"

namespace kelix::cuda {

inline constexpr int kDrawThreads = 512;
inline constexpr uint32_t kInfinityBits = 0x7f800000u;
inline constexpr float kLargestFinite = 3.402823466e38f;
// So few candidates are compared each with each: cheaper than 31 reductions over the CTA.
inline constexpr int kRankedCandidates = 256;

struct DrawShared {
  uint64_t words[kDrawThreads / kWarpSize];
  float floats[kDrawThreads / kWarpSize];
  float nearest[kDrawThreads];  // the least distance in each of up to so many groups of columns
  float ranked[kRankedCandidates];
  uint64_t weights[kRankedCandidates];
  int count;
};

struct Drawn {
  int64_t id;  // -1: the row has a NaN, +inf, or nothing but -inf
  float logprob;
};

// Columns that may be drawn, in no particular order. distance = (max - logit) / temperature.
struct Candidates {
  float* distance;
  int* column;
  int count;
};

__device__ __forceinline__ uint64_t cta_total(uint64_t value, DrawShared& shared) {
  return cta_reduce(value, shared.words, [](uint64_t a, uint64_t b) { return a + b; });
}

// The largest `value` of the CTA's (value, column) pairs; of equal ones the lowest column.
__device__ __forceinline__ uint64_t pack_best(float value, uint32_t column) {
  const uint32_t bits = bits_of_float(value + 0.0f);  // -0 becomes 0
  const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return (static_cast<uint64_t>(ordered) << 32) | (0xffffffffu - column);
}
__device__ __forceinline__ int64_t best_column(uint64_t best, DrawShared& shared) {
  best = cta_reduce(best, shared.words, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  return 0xffffffffu - static_cast<uint32_t>(best);
}

// exp(-distance) in steps of 2^-40: 2^23 candidates at the maximum fit into 64 bits.
__device__ __forceinline__ uint64_t mass_of(float distance) {
  return static_cast<uint64_t>(expf(-distance) * 0x1p40f);
}

// Largest n in [0, last] with holds(n), which must hold for 0 and stop holding once.
template <class Holds>
__device__ __forceinline__ uint32_t last_that_holds(uint32_t last, const Holds& holds) {
  uint32_t low = 0;
  while (low < last) {
    const uint32_t middle = low + (last - low + 1) / 2;
    if (holds(middle)) {
      low = middle;
    } else {
      last = middle - 1;
    }
  }
  return low;
}

// Total of weight(i) over the candidates strictly nearer to the maximum than `limit`.
template <class Weight>
__device__ uint64_t weight_within(const float* distance, int count, float limit,
                                  const Weight& weight, DrawShared& shared) {
  uint64_t sum = 0;
  for (int i = threadIdx.x; i < count; i += kDrawThreads) {
    if (distance[i] < limit) sum += weight(i);
  }
  return cta_total(sum, shared);
}

// kept_distance for at most kRankedCandidates: each looks at all others.
template <class Weight>
__device__ float kept_distance_by_rank(const float* distance, int count, uint64_t target,
                                       const Weight& weight, DrawShared& shared) {
  const int mine = threadIdx.x;
  const bool takes_part = mine < count;
  const float own = takes_part ? distance[mine] : 0.0f;
  const uint64_t own_weight = takes_part ? weight(mine) : 0;
  if (takes_part) {
    shared.ranked[mine] = own;
    shared.weights[mine] = own_weight;
  }
  // Its barriers also show the arrays to all.
  if (cta_total(own_weight, shared) < target) return kLargestFinite;
  uint64_t nearer = 0;
  if (takes_part) {
    for (int i = 0; i < count; ++i) nearer += shared.ranked[i] < own ? shared.weights[i] : 0;
  }
  const float reached = takes_part && nearer < target ? own : 0.0f;
  const float farthest =
      cta_reduce(reached, shared.floats, [](float a, float b) { return fmaxf(a, b); });
  return fminf(farthest, kLargestFinite);
}

// The largest distance for which the candidates strictly nearer weigh less than `target`.
template <class Weight>
__device__ float kept_distance(const float* distance, int count, uint64_t target,
                               const Weight& weight, DrawShared& shared) {
  if (count <= kRankedCandidates) {
    return kept_distance_by_rank(distance, count, target, weight, shared);
  }
  const uint32_t bits = last_that_holds(kInfinityBits, [&](uint32_t middle) {
    return weight_within(distance, count, float_of_bits(middle), weight, shared) < target;
  });
  return fminf(float_of_bits(bits), kLargestFinite);
}

// What top-k, top-p and min-p leave: candidates nearer than `distance`, and of those at it the
// columns up to `column`.
struct Kept {
  float distance;
  int column;
};

__device__ inline Kept keep_top_p(const Candidates& from, float limit, uint64_t target,
                                  bool reference, int cols, DrawShared& shared) {
  const auto mass = [&](int i) {
    return from.distance[i] <= limit ? mass_of(from.distance[i]) : 0;
  };
  const float distance = kept_distance(from.distance, from.count, target, mass, shared);
  if (!reference) return {fminf(distance, limit), cols};
  // The released rule drops the candidate that crosses the threshold; of equal ones the first in
  // column order stay while they fit.
  const uint64_t nearer = weight_within(from.distance, from.count, distance, mass, shared);
  const uint64_t one = mass_of(distance);
  uint64_t fit = one == 0 ? cols : (target > nearer ? (target - nearer) / one : 0);
  if (nearer == 0 && fit == 0) fit = 1;
  if (fit == 0) return {distance, -1};
  const uint32_t column = last_that_holds(static_cast<uint32_t>(cols), [&](uint32_t middle) {
    uint64_t before = 0;
    for (int i = threadIdx.x; i < from.count; i += kDrawThreads) {
      before += from.distance[i] == distance && from.column[i] < static_cast<int>(middle);
    }
    return cta_total(before, shared) < fit;
  });
  return {fminf(distance, limit), static_cast<int>(column)};
}

// Appends the columns no farther than `limit`.
template <class T>
__device__ int gather_candidates(const T* row, int cols, float peak, float temperature, float limit,
                                 const Candidates& found, DrawShared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  for (int c = threadIdx.x; c < cols; c += kDrawThreads) {
    const float distance = (peak - to_float(row[c])) / temperature;
    if (!(distance <= limit)) continue;
    const int at = atomic_add(&shared.count, 1);
    found.distance[at] = distance;
    found.column[at] = c;
  }
  __syncthreads();
  return shared.count;
}

// What a rule asks of a row of `cols` columns.
struct Filter {
  float temperature, min_p;
  uint64_t wanted;  // top-k, when by_count
  bool by_count, by_mass, greedy;
};

__device__ __forceinline__ Filter filter_of(const DrawRule& rule, int cols) {
  Filter filter;
  const float raised = rule.reference ? rule.temperature + 1e-5f : rule.temperature;
  filter.temperature = rule.temperature > 0 ? raised : 1.0f;
  filter.min_p = rule.reference ? 0.0f : rule.min_p;
  filter.by_count = rule.top_k >= 1 && rule.top_k < static_cast<float>(cols);
  filter.wanted = filter.by_count ? static_cast<uint64_t>(rule.top_k) : 0;
  filter.by_mass = rule.top_p < 1;
  filter.greedy = rule.top_k == 1 || (rule.temperature <= 0 && !rule.reference);
  return filter;
}

// A distance that at least `wanted` columns reach. `top`: the largest logit of the columns that the
// thread stands for; all threads together stand for every column once.
__device__ inline float distance_of_wanted(float top, float peak, const Filter& filter,
                                           DrawShared& shared) {
  if (filter.wanted > kDrawThreads) return kLargestFinite;
  constexpr int kFold = kDrawThreads / kRankedCandidates;
  // Groups well above k in number, or about every column would pass.
  const int fold = 2 * filter.wanted <= kRankedCandidates ? kFold : 1;
  for (int offset = 1; offset < fold; offset *= 2) top = fmaxf(top, shuffle_xor(top, offset));
  if (threadIdx.x % fold == 0) {
    shared.nearest[threadIdx.x / fold] = (peak - top) / filter.temperature;
  }
  __syncthreads();
  return kept_distance(
      shared.nearest, kDrawThreads / fold, filter.wanted, [](int) { return 1; }, shared);
}

// All candidates farther than this weigh less than 1 - top_p together, and the nearest is no
// farther whatever top_p is. `sum`: of exp(-distance).
__device__ __forceinline__ float distance_of_mass(float sum, float top_p, int cols) {
  return logf(fmaxf(cols / ((1 - top_p) * sum), 1.0f)) + 0.1f;
}

// Gumbel's trick: the candidate with the best score is a draw from their softmax.
__device__ __forceinline__ uint64_t packed_score(const DrawRule& rule, float distance, int column) {
  const uint32_t word = candidate_word(rule.seed, rule.step, static_cast<uint32_t>(rule.slot),
                                       static_cast<uint32_t>(rule.first_id + column));
  const float gumbel = -logf(-logf(uniform_of(word)));
  return pack_best(gumbel - distance, column);
}

__device__ __forceinline__ bool below_min_p(float distance, float min_p) {
  return min_p > 0 && distance > 0 && expf(-distance) < min_p;
}

// The column drawn among gathered candidates, which hold all that the filter can keep. `total`: the
// mass of the whole row, for top-p without top-k.
__device__ inline int64_t draw_candidate(const DrawRule& rule, const Filter& filter, int cols,
                                         uint64_t total, const Candidates& found,
                                         DrawShared& shared) {
  float limit = kLargestFinite;
  if (filter.by_count) {
    limit =
        kept_distance(found.distance, found.count, filter.wanted, [](int) { return 1; }, shared);
  }
  Kept kept{limit, cols};
  if (filter.by_mass) {
    if (filter.by_count) {
      const auto mass = [&](int i) {
        return found.distance[i] <= limit ? mass_of(found.distance[i]) : 0;
      };
      total = weight_within(found.distance, found.count, INFINITY, mass, shared);
    }
    const double target = static_cast<double>(rule.top_p) * total;
    kept = keep_top_p(found, limit, target > 0 ? static_cast<uint64_t>(ceil(target)) : 0,
                      rule.reference, cols, shared);
  }
  uint64_t best = 0;
  for (int i = threadIdx.x; i < found.count; i += kDrawThreads) {
    const float distance = found.distance[i];
    const int column = found.column[i];
    if (distance > kept.distance || (distance == kept.distance && column > kept.column)) continue;
    if (below_min_p(distance, filter.min_p)) continue;
    const uint64_t packed = packed_score(rule, distance, column);
    best = packed > best ? packed : best;
  }
  return best_column(best, shared);
}

// The column drawn from a row that one CTA reads alone. `top`: the largest logit among the thread's
// own columns.
template <class T>
__device__ int64_t draw_column(const T* row, int cols, const DrawRule& rule, const Filter& filter,
                               float peak, float top, Candidates found, DrawShared& shared) {
  float limit = kLargestFinite;
  uint64_t total = 0;
  if (filter.by_count) {
    limit = distance_of_wanted(top, peak, filter, shared);
  } else if (filter.by_mass) {
    for (int c = threadIdx.x; c < cols; c += kDrawThreads) {
      total += mass_of((peak - to_float(row[c])) / filter.temperature);
    }
    total = cta_total(total, shared);
    limit = distance_of_mass(total * 0x1p-40f, rule.top_p, cols);
  }
  found.count = gather_candidates(row, cols, peak, filter.temperature, limit, found, shared);
  return draw_candidate(rule, filter, cols, total, found, shared);
}

// Called by all kDrawThreads threads; the same result in each. For rows that are not wide.
// workspace: 2 * width floats of this row's own.
template <class T>
__device__ Drawn draw_row(const T* row, int64_t width, const DrawRule& rule, float* workspace,
                          DrawShared& shared) {
  const int cols = static_cast<int>(width);
  float top = -INFINITY;
  bool bad = false;
  uint64_t best = 0;
  for (int c = threadIdx.x; c < cols; c += kDrawThreads) {
    const float v = to_float(row[c]);
    bad |= !(v < INFINITY);  // NaN or +inf
    if (v > top) {
      top = v;
      best = pack_best(v, c);
    }
  }
  const float peak =
      cta_reduce(bad ? INFINITY : top, shared.floats, [](float a, float b) { return fmaxf(a, b); });
  if (!(fabsf(peak) < INFINITY)) return {-1, NAN};
  float sum = 0;
  for (int c = threadIdx.x; c < cols; c += kDrawThreads) sum += expf(to_float(row[c]) - peak);
  const float log_sum = logf(cta_sum(sum, shared.floats));
  const Filter filter = filter_of(rule, cols);
  const Candidates found{workspace, reinterpret_cast<int*>(workspace + width), 0};
  const int64_t column = filter.greedy
                             ? best_column(best, shared)
                             : draw_column(row, cols, rule, filter, peak, top, found, shared);
  return {rule.first_id + column, to_float(row[column]) - peak - log_sum};
}

__device__ __forceinline__ DrawRule rule_of_row(const SampleArgs& args, int64_t r) {
  const float* params = args.params + 4 * r;
  return {params[0],     params[1],     params[2],     params[3],     args.seeds[r],
          args.steps[r], args.slots[r], args.first_id, args.reference};
}

__device__ __forceinline__ void store_drawn(const SampleArgs& args, int64_t r, const Drawn& drawn) {
  if (threadIdx.x != 0) return;
  args.ids[r] = drawn.id;
  args.logprobs[r] = drawn.logprob;
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) sample_blocks_kernel(SampleArgs args) {
  KELIX_SHARED(DrawShared, shared);
  const int64_t r = blockIdx.x;
  const T* row = static_cast<const T*>(args.logits) + r * args.cols;
  float* workspace = args.workspace + r * draw_workspace(args.cols);
  store_drawn(args, r, draw_row(row, args.cols, rule_of_row(args, r), workspace, shared));
}

}  // namespace kelix::cuda
