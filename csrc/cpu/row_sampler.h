// Draws one id from one row of float32 logits. Nothing is sorted: every rule keeps the candidates
// down to some distance below the maximum, and that distance is found by bisection over the bits of
// a float, on the few candidates that can matter.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/philox.h"
#include "common/sampling.h"
#include "cpu/simd.h"

namespace kelix {
namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kLargestFinite = 0x1.fffffep127f;

struct Drawn {
  int64_t id;  // -1: the row has a NaN, +inf, or nothing but -inf
  float logprob;
};

// Candidates in column order. distance = (max - logit) / temperature >= 0, so that the order of
// floats is the order of their bits.
struct Candidates {
  float* distance;
  int32_t* column;
  float* weight;  // exp(-distance), set before it is needed
  int64_t count;
};

struct RowPeak {
  float value;
  bool valid;
};

inline RowPeak chunk_maxima(const float* row, int64_t cols, float* maxima) {
  float peak = -__builtin_inff();
  int has_nan = 0;
  for (int64_t begin = 0; begin < cols; begin += kDrawChunk) {
    const int64_t end = begin + kDrawChunk < cols ? begin + kDrawChunk : cols;
    float top = -__builtin_inff();
    int nan_here = 0;
#pragma omp simd reduction(max : top) reduction(| : nan_here)
    for (int64_t c = begin; c < end; ++c) {
      top = row[c] > top ? row[c] : top;
      nan_here |= row[c] != row[c];
    }
    *maxima++ = top;
    peak = top > peak ? top : peak;
    has_nan |= nan_here;
  }
  return {peak, has_nan == 0 && peak - peak == 0.0f};
}

inline int64_t lowest_column_of(const float* row, float peak) {
  int64_t c = 0;
  while (row[c] != peak) ++c;
  return c;
}

// sum of exp((logit - peak) / temperature).
inline float softmax_sum(const float* row, int64_t cols, float peak, float temperature) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < cols; ++c) sum += exp_simd((row[c] - peak) / temperature);
  return sum;
}

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Total weight of the candidates nearer to the maximum than `limit`.
inline float weight_within(const float* distance, const float* weight, int64_t count, float limit) {
  float sum = 0;
  if (weight == nullptr) {
    int32_t nearer = 0;
#pragma omp simd reduction(+ : nearer)
    for (int64_t i = 0; i < count; ++i) nearer += distance[i] < limit;
    return static_cast<float>(nearer);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += distance[i] < limit ? weight[i] : 0.0f;
  return sum;
}

// The largest distance d for which the candidates strictly nearer weigh less than `target`; a null
// weight counts them. 0 when there is none, so that the maximum always stays.
inline float kept_distance(const float* distance, const float* weight, int64_t count,
                           float target) {
  uint32_t low = 0, high = kInfinityBits;
  while (low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    if (weight_within(distance, weight, count, float_of_bits(middle)) < target) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const float kept = float_of_bits(low);
  return kept < kLargestFinite ? kept : kLargestFinite;
}

// All columns no farther than `limit`; chunks whose maximum is farther are not read.
inline int64_t gather_candidates(const float* row, int64_t cols, const float* chunk_distance,
                                 float peak, float temperature, float limit, Candidates found) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < cols; begin += kDrawChunk) {
    if (!(*chunk_distance++ <= limit)) continue;
    const int64_t end = begin + kDrawChunk < cols ? begin + kDrawChunk : cols;
    for (int64_t c = begin; c < end; ++c) {
      const float distance = (peak - row[c]) / temperature;
      found.distance[count] = distance;
      found.column[count] = static_cast<int32_t>(c);
      count += distance <= limit;
    }
  }
  return count;
}

inline int64_t drop_beyond(Candidates from, float limit) {
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    from.distance[count] = from.distance[i];
    from.column[count] = from.column[i];
    count += from.distance[i] <= limit;
  }
  return count;
}

// The released model's top-p drops the candidate that crosses the threshold; of equal ones the
// first in column order stay while they fit.
inline int64_t drop_crossing(Candidates from, float limit, float target) {
  const float nearer = weight_within(from.distance, from.weight, from.count, limit);
  float mass = nearer;
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    bool keep = from.distance[i] < limit;
    if (from.distance[i] == limit) {
      mass += from.weight[i];
      keep = mass <= target || (nearer == 0.0f && mass == from.weight[i]);
    }
    from.distance[count] = from.distance[i];
    from.column[count] = from.column[i];
    count += keep;
  }
  return count;
}

inline float set_weights(Candidates found) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < found.count; ++i) {
    found.weight[i] = exp_simd(-found.distance[i]);
    total += found.weight[i];
  }
  return total;
}

inline int64_t keep_top_p(Candidates from, float target, bool reference) {
  const float limit = kept_distance(from.distance, from.weight, from.count, target);
  return reference ? drop_crossing(from, limit, target) : drop_beyond(from, limit);
}

inline int64_t keep_min_p(Candidates from, float min_p) {
  int64_t count = 0;
  for (int64_t i = 0; i < from.count; ++i) {
    const float distance = from.distance[i];
    from.distance[count] = distance;
    from.column[count] = from.column[i];
    count += !(distance > 0 && std::exp(-distance) < min_p);
  }
  return count;
}

// argmax of gumbel - distance, the lowest column on ties.
inline int64_t draw_gumbel(const Candidates& from, const DrawRule& rule) {
  constexpr int64_t kTile = 64;
  uint32_t words[kTile];
  float chance[kTile];
  float best = -__builtin_inff();
  int64_t winner = 0;
  for (int64_t begin = 0; begin < from.count; begin += kTile) {
    const int64_t size = from.count - begin < kTile ? from.count - begin : kTile;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const int64_t id = rule.first_id + from.column[begin + i];
      words[i] = candidate_word(rule.seed, rule.step, static_cast<uint32_t>(rule.slot),
                                static_cast<uint32_t>(id));
      // gumbel > t needs 1 - u < exp(-t), as exp(-x) >= 1 - x. Most candidates fail this (with room
      // for rounding) and are spared two logarithms.
      chance[i] = exp_simd(-from.distance[begin + i] - best) * 1.01f + 1e-6f;
    }
    for (int64_t i = 0; i < size; ++i) {
      const float u = uniform_of(words[i]);
      if (1.0f - u > chance[i]) continue;
      const float score = -std::log(-std::log(u)) - from.distance[begin + i];
      if (score > best) {
        best = score;
        winner = from.column[begin + i];
      }
    }
  }
  return winner;
}

// The column drawn at temperature > 0. chunk_distance holds the chunk maxima and is overwritten.
inline int64_t draw_column(const float* row, int64_t cols, const DrawRule& rule, float peak,
                           float* chunk_distance, Candidates found) {
  const float raised = rule.reference ? rule.temperature + 1e-5f : rule.temperature;
  const float temperature = rule.temperature > 0 ? raised : 1.0f;
  const bool by_count = rule.top_k >= 1 && rule.top_k < static_cast<float>(cols);
  const bool by_mass = rule.top_p < 1;
  const float wanted = std::floor(rule.top_k);
  const int64_t chunks = (cols + kDrawChunk - 1) / kDrawChunk;
  for (int64_t i = 0; i < chunks; ++i) {
    chunk_distance[i] = (peak - chunk_distance[i]) / temperature;
  }
  float limit = kLargestFinite, total = 0;
  if (by_count) {
    // k chunks have their maxima this near, so the k nearest candidates are too.
    if (static_cast<float>(chunks) >= wanted) {
      limit = kept_distance(chunk_distance, nullptr, chunks, wanted);
    }
  } else if (by_mass) {
    // All candidates farther than this weigh less than 1 - top_p together, and the nearest is no
    // farther whatever top_p is.
    total = softmax_sum(row, cols, peak, temperature);
    limit = std::log(std::fmax(static_cast<float>(cols) / ((1 - rule.top_p) * total), 1.0f)) + 0.1f;
  }
  found.count = gather_candidates(row, cols, chunk_distance, peak, temperature, limit, found);
  if (by_count) {
    found.count = drop_beyond(found, kept_distance(found.distance, nullptr, found.count, wanted));
  }
  if (by_mass) {
    const float kept_total = set_weights(found);
    found.count = keep_top_p(found, rule.top_p * (by_count ? kept_total : total), rule.reference);
  }
  if (rule.min_p > 0 && !rule.reference) found.count = keep_min_p(found, rule.min_p);
  return draw_gumbel(found, rule);
}

// workspace: draw_workspace(cols) floats, of which the first `cols` may hold the row itself.
inline Drawn draw_row(const float* row, int64_t cols, const DrawRule& rule, float* workspace) {
  float* maxima = workspace + 4 * cols;
  const RowPeak peak = chunk_maxima(row, cols, maxima);
  if (!peak.valid) return {-1, __builtin_nanf("")};
  const float log_sum = std::log(softmax_sum(row, cols, peak.value, 1.0f));
  const bool greedy = rule.top_k == 1 || (rule.temperature <= 0 && !rule.reference);
  const Candidates found{workspace + cols, reinterpret_cast<int32_t*>(workspace + 2 * cols),
                         workspace + 3 * cols, 0};
  const int64_t column = greedy ? lowest_column_of(row, peak.value)
                                : draw_column(row, cols, rule, peak.value, maxima, found);
  return {rule.first_id + column, row[column] - peak.value - log_sum};
}

}  // namespace
}  // namespace kelix
