// What depthwise_glu and its gradient share: activations, blocks of channels, and a row of a 3x3
// depthwise convolution whose vector lanes run over channels.
#pragma once

#include <cmath>

#include "cpu/diffusion.h"
#include "cpu/register_tile.h"
#include "cpu/simd.h"

namespace kelix {
namespace {

constexpr int64_t kBlock = kDepthwiseChannels;
constexpr int kTaps = 9;
static_assert(kBlock % kLanes == 0);

// erf(x) that vectorises: |error| < 1.2e-7.
inline float erf_simd(float x) {
  const float square = x * x;
  float inner = -5.96761703e-4f;
  inner = inner * square + 4.99119423e-3f;
  inner = inner * square - 2.67681349e-2f;
  inner = inner * square + 1.12819925e-1f;
  inner = inner * square - 3.76125336e-1f;
  inner = inner * square + 1.28379166e-1f;
  inner = inner * x + x;
  const float size = std::fabs(x) > 4.0f ? 4.0f : std::fabs(x);  // erf(4) rounds to 1
  const float size_square = size * size;
  float outer = -1.72853470e-5f * size + 3.83197126e-4f;
  outer = outer * size_square + (-3.88396438e-3f * size + 2.42546219e-2f);
  outer = outer * size - 1.06777877e-1f;
  outer = outer * size - 6.34846687e-1f;
  outer = outer * size - 1.28717512e-1f;
  outer = outer * size - size;
  const float tail = 1.0f - exp_simd(outer);
  return size > 0.927734375f ? (x < 0.0f ? -tail : tail) : inner;
}

[[maybe_unused]] void activate(Activation activation, float* x, int64_t count) {
  if (activation == Activation::kSilu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) x[i] = silu_simd(x[i]);
  } else if (activation == Activation::kGelu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      x[i] = 0.5f * x[i] * (1.0f + erf_simd(x[i] * 0.70710678f));
    }
  }
}

// A block of channels [first, first + size) of both halves, on the rows [top, bottom) of an image.
struct Piece {
  int64_t image;
  int64_t top;
  int64_t bottom;
  int64_t first;
  int64_t size;
  int64_t width;  // size rounded up to whole vectors
};

// Block `index` of the channels, on all rows of the first image.
[[maybe_unused]] Piece channel_block(const DepthwiseGluArgs& args, int64_t index) {
  Piece piece{};
  piece.bottom = args.height;
  piece.first = index * kBlock;
  const int64_t channels = args.channels - piece.first;
  piece.size = channels < kBlock ? channels : kBlock;
  piece.width = (piece.size + kLanes - 1) / kLanes * kLanes;
  return piece;
}

// Row h, activated, as [width + 2][2][piece.width]; zeros outside the image and past the channels.
template <class T>
void load_row(const DepthwiseGluArgs& args, const Piece& piece, int64_t h, float* row) {
  std::memset(row, 0, static_cast<size_t>((args.width + 2) * 2 * piece.width) * sizeof(float));
  if (h < 0 || h >= args.height) return;
  const T* x = static_cast<const T*>(args.x) +
               (piece.image * args.height + h) * args.width * 2 * args.channels + piece.first;
  for (int64_t w = 0; w < args.width; ++w) {
    for (int64_t half = 0; half < 2; ++half) {
      const T* source = x + (w * 2 + half) * args.channels;
      float* target = row + ((w + 1) * 2 + half) * piece.width;
#pragma omp simd
      for (int64_t c = 0; c < piece.size; ++c) target[c] = to_float(source[c]);
    }
  }
  activate(args.pre_act, row + 2 * piece.width, args.width * 2 * piece.width);
}

// The weights as [2][kTaps][kBlock] and the biases as [2][kBlock].
template <class T>
void load_weights(const DepthwiseGluArgs& args, const Piece& piece, float* weight, float* bias) {
  const T* weights = static_cast<const T*>(args.weight);
  const T* biases = static_cast<const T*>(args.bias);
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t c = 0; c < kBlock; ++c) {
      const bool inside = c < piece.size;
      const int64_t channel = half * args.channels + piece.first + c;
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        weight[(half * kTaps + tap) * kBlock + c] =
            inside ? to_float(weights[channel * kTaps + tap]) : 0.0f;
      }
      bias[half * kBlock + c] = inside ? to_float(biases[channel]) : 0.0f;
    }
  }
}

// One half of one output row, [width][lanes]; rows are the three input rows from the top.
[[maybe_unused]] void convolve_row(const float* const (&rows)[3], const float* weight,
                                   const float* bias, int64_t half, int64_t width, int64_t lanes,
                                   float* out) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    Vector taps[kTaps];
#pragma GCC unroll 9
    for (int tap = 0; tap < kTaps; ++tap) {
      taps[tap] = *reinterpret_cast<const Vector*>(weight + (half * kTaps + tap) * kBlock + lane);
    }
    const Vector start = *reinterpret_cast<const Vector*>(bias + half * kBlock + lane);
    for (int64_t w = 0; w < width; ++w) {
      Vector sum = start;
#pragma GCC unroll 9
      for (int tap = 0; tap < kTaps; ++tap) {
        const float* source = rows[tap / 3] + ((w + tap % 3) * 2 + half) * lanes + lane;
        sum += taps[tap] * *reinterpret_cast<const Vector*>(source);
      }
      *reinterpret_cast<Vector*>(out + w * lanes + lane) = sum;
    }
  }
}

}  // namespace
}  // namespace kelix
