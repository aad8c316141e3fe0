// y = W x + bias (+ added) for a few rows x: each weight is read from memory once for the whole
// batch. The order of a dot product's additions never depends on the batch or on the tile, so that
// a row's result does not either.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#include "common/parallel.h"
#include "cpu/simd.h"

namespace kelix {
namespace {

constexpr int64_t kProductOutputs = 4;
constexpr int64_t kProductRows = kLanes == 16 ? 4 : 2;  // what the vector registers hold

// How far ahead weights are asked for, into the L2 cache: the hardware alone starts over at every
// short row.
constexpr int64_t kAheadBytes = 16384;

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// By value: through a reference GCC kept what it loaded, and a tile's sums with it, on the stack.
inline Lanes load_lanes(const float* from) {
  typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  return *reinterpret_cast<const Loose*>(from);
}

// Intrinsics here and below: GCC takes a conversion of vectors apart, into halves or single
// elements.
inline Lanes load_lanes(const bf16* from) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_maskz_cvtepu16_epi32(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return reinterpret_cast<Lanes>(_mm512_maskz_slli_epi32(0xffff, words, 16));
#elif defined(__AVX2__)
  const __m256i words =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Lanes>(_mm256_slli_epi32(words, 16));
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  const Halves halves = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Lanes>(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline Lanes load_lanes(const f16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
  return reinterpret_cast<Lanes>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Lanes wide = {};
  for (int i = 0; i < kLanes; ++i) wide[i] = to_float(from[i]);
  return wide;
#endif
}

inline Lanes load_lanes(const int8_t* from) {
#if defined(__AVX512F__)
  const __m512i words =
      _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Lanes>(_mm512_maskz_cvtepi32_ps(0xffff, words));
#elif defined(__AVX2__)
  const __m256i words =
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return reinterpret_cast<Lanes>(_mm256_cvtepi32_ps(words));
#elif defined(__SSE4_1__)
  int32_t bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return reinterpret_cast<Lanes>(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(bytes))));
#else
  Lanes wide = {};
  for (int i = 0; i < kLanes; ++i) wide[i] = from[i];
  return wide;
#endif
}

inline float sum_lanes(const Lanes& v) {
  // Halving: a chain of kLanes additions would cost as much as a short dot product.
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const Lanes& eight = v;
#endif
#if defined(__AVX2__)
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  const Lanes& four = v;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// weight [out, in], bias [out] or null; x [batch, in]; added [batch, out] or null, it may be y;
// y [batch, out]. scale [out], of int8 weights, or null.
template <class T>
struct Linear {
  const T* weight;
  const T* bias;
  const float* x;
  const float* added;
  float* y;
  int64_t in, out, batch;
  const float* scale = nullptr;
};

template <int kOutputs, int kRows, class T>
void linear_tile(const Linear<T>& a, int64_t output, int64_t row) {
  const T* weight = a.weight + output * a.in;
  const float* x = a.x + row * a.in;
  Lanes sums[kOutputs][kRows] = {};
  int64_t i = 0;
  for (; i + kLanes <= a.in; i += kLanes) {
    Lanes w[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const T* from = weight + o * a.in + i;
      w[o] = load_lanes(from);
      // Past the end of the weights this asks for nothing, and never faults.
      __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, 0, 2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Lanes v = load_lanes(x + r * a.in + i);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) sums[o][r] += w[o] * v;
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float sum = sum_lanes(sums[o][r]);
      for (int64_t t = i; t < a.in; ++t) sum += to_float(weight[o * a.in + t]) * x[r * a.in + t];
      const int64_t at = (row + r) * a.out + output + o;
      if (a.scale != nullptr) sum *= a.scale[output + o];
      if (a.bias != nullptr) sum += to_float(a.bias[output + o]);
      if (a.added != nullptr) sum += a.added[at];
      a.y[at] = sum;
    }
  }
}

template <int kOutputs, class T>
void linear_outputs(const Linear<T>& a, int64_t output) {
  int64_t row = 0;
  for (; row + kProductRows <= a.batch; row += kProductRows) {
    linear_tile<kOutputs, kProductRows>(a, output, row);
  }
  for (; row < a.batch; ++row) linear_tile<kOutputs, 1>(a, output, row);
}

template <class T>
void linear(const Linear<T>& a, const ParallelFor& parallel) {
  const int64_t tiles = (a.out + kProductOutputs - 1) / kProductOutputs;
  const int64_t grain = 1 + 65536 / (kProductOutputs * a.in * a.batch + 1);
  parallel(tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t output = tile * kProductOutputs;
      if (output + kProductOutputs <= a.out) {
        linear_outputs<kProductOutputs>(a, output);
      } else {
        for (; output < a.out; ++output) linear_outputs<1>(a, output);
      }
    }
  });
}

}  // namespace
}  // namespace kelix
