// The gated depthwise 3x3 convolution. A CTA takes 32 channels of both halves, 32 columns and a
// strip of rows. Row by row it loads 16 bytes a thread, activates each value once into shared
// memory, and adds the row to the sums of the three output rows it touches, which stay in
// registers:
//
//   row h of x --activate--> shared [half][column][channel] --taps 6..8--> output row h - 1, done
//                             (two buffers, one barrier a row) --taps 3..5--> output row h
//                                                              --taps 0..2--> output row h + 1
#pragma once

#include "common/ceil_div.h"
#include "common/diffusion.h"
#include "kernels/activate.cuh"
#include "kernels/row.cuh"

namespace kelix::cuda {

inline constexpr int kGluThreads = 256;
inline constexpr int kGluChannels = 32;  // of each half: a lane takes one
inline constexpr int kGluColumns = 32;
inline constexpr int kWarpColumns = kGluColumns / (kGluThreads / kWarpSize);
inline constexpr int kGluStrip = 16;  // output rows of one CTA, at most
inline constexpr int kGluPiece = 8;   // channels that a thread loads together
inline constexpr int kPixelPieces = kGluChannels / kGluPiece;
inline constexpr int kTaps = 9;
static_assert(kGluChannels == kWarpSize && 2 * kGluColumns * kPixelPieces == kGluThreads);

// One activated row with a column on each side.
using GluRow = float[2][kGluColumns + 2][kGluChannels];

inline int64_t glu_ctas(const DepthwiseGluArgs& args) {
  return args.batch * ceil_div(args.channels, kGluChannels) * ceil_div(args.width, kGluColumns) *
         ceil_div(args.height, kGluStrip);
}

// What one CTA computes.
struct GluTile {
  int64_t image;
  int64_t top;  // output rows [top, bottom)
  int64_t bottom;
  int64_t left;
  int64_t channel;
};

__device__ __forceinline__ GluTile glu_tile(const DepthwiseGluArgs& args) {
  const auto slices = static_cast<unsigned>(ceil_div(args.channels, kGluChannels));
  const auto columns = static_cast<unsigned>(ceil_div(args.width, kGluColumns));
  const auto strips = static_cast<unsigned>(ceil_div(args.height, kGluStrip));
  const int64_t rows = ceil_div(args.height, strips);  // strips of equal height
  const unsigned place = blockIdx.x / slices;
  const int64_t top = place / columns % strips * rows;
  return {place / columns / strips, top, min(top + rows, args.height),
          static_cast<int64_t>(place % columns) * kGluColumns,
          static_cast<int64_t>(blockIdx.x % slices) * kGluChannels};
}

// Reads kGluPiece channels of one column of the image, row by row; zero outside the image, because
// every activation keeps zero.
template <class T, bool kVectors>
class ColumnReader {
 public:
  __device__ __forceinline__ ColumnReader(const DepthwiseGluArgs& args, int64_t image, int64_t h,
                                          int64_t w, int half, int64_t channel)
      : next_(static_cast<const T*>(args.x) +
              (((image * args.height + h) * args.width + w) * 2 + half) * args.channels + channel),
        row_stride_(args.width * 2 * args.channels),
        h_(static_cast<int>(h)),
        height_(static_cast<int>(args.height)),
        valid_(w >= 0 && w < args.width
                   ? static_cast<int>(min(args.channels - channel, int64_t{kGluPiece}))
                   : 0) {}

  // The row it stands at; then it goes one down.
  __device__ __forceinline__ void read(T (&to)[kGluPiece]) {
    const int valid = h_ >= 0 && h_ < height_ ? valid_ : 0;
    if (kVectors && valid > 0) {
      load_vector(next_, to);
    } else {
#pragma unroll
      for (int i = 0; i < kGluPiece; ++i) {
        to[i] = !kVectors && i < valid ? next_[i] : from_float<T>(0.0f);
      }
    }
    next_ += row_stride_;
    ++h_;
  }

 private:
  const T* next_;
  int64_t row_stride_;
  int h_;
  int height_;
  int valid_;  // channels that exist
};

// The choice stands outside the loop: one branch and not one per value.
template <class T, int kCount>
__device__ __forceinline__ void activate(Activation activation, float (&values)[kCount]) {
  if (activation == Activation::kSilu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = silu<T>(values[i]);
  } else if (activation == Activation::kGelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = gelu(values[i]);
  }
}

// `to` is shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void store_activated(Activation activation, const T (&from)[kGluPiece],
                                                float* to) {
  float values[kGluPiece];
#pragma unroll
  for (int i = 0; i < kGluPiece; ++i) values[i] = to_float(from[i]);
  activate<T>(activation, values);
#pragma unroll
  for (int i = 0; i < kGluPiece; i += 4) {
    *reinterpret_cast<float4*>(to + i) =
        make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
  }
}

// The columns beside the tile, which only images wider than it have: a few threads' work.
template <class T, bool kVectors>
__device__ void stage_sides(const DepthwiseGluArgs& args, const GluTile& tile, int64_t h,
                            GluRow& row) {
  const int half = threadIdx.x / (2 * kPixelPieces);
  const int side = threadIdx.x / kPixelPieces % 2;
  const int piece = threadIdx.x % kPixelPieces * kGluPiece;
  if (half >= 2) return;
  const int64_t w = side == 0 ? tile.left - 1 : tile.left + kGluColumns;
  T values[kGluPiece];
  ColumnReader<T, kVectors>(args, tile.image, h, w, half, tile.channel + piece).read(values);
  store_activated(args.pre_act, values, &row[half][side * (kGluColumns + 1)][piece]);
}

// The taps of a CTA's channels, [half][channel][tap], zero past the last channel.
template <class T>
__device__ void load_taps(const DepthwiseGluArgs& args, const GluTile& tile,
                          float (&taps)[2][kGluChannels * kTaps]) {
  const T* weight = static_cast<const T*>(args.weight);
  for (int i = threadIdx.x; i < 2 * kGluChannels * kTaps; i += kGluThreads) {
    const int half = i / (kGluChannels * kTaps);
    const int64_t at = tile.channel * kTaps + i % (kGluChannels * kTaps);
    const bool inside = at < args.channels * kTaps;
    taps[half][i % (kGluChannels * kTaps)] =
        inside ? to_float(weight[half * args.channels * kTaps + at]) : 0.0f;
  }
}

// One channel's sums for kWarpColumns neighbouring pixels of three output rows.
struct GluSums {
  float rows[3][kWarpColumns];

  // Adds an activated row, read from its first column on, to all three.
  __device__ __forceinline__ void add(const float (*pixels)[kGluChannels],
                                      const float (&taps)[kTaps]) {
#pragma unroll
    for (int c = 0; c < kWarpColumns + 2; ++c) {
      const float v = pixels[c][threadIdx.x % kWarpSize];
#pragma unroll
      for (int tap = 0; tap < 3; ++tap) {
        const int out = c - tap;
        if (out < 0 || out >= kWarpColumns) continue;
#pragma unroll
        for (int r = 0; r < 3; ++r) rows[r][out] += taps[6 - 3 * r + tap] * v;
      }
    }
  }

  __device__ __forceinline__ void start(float bias) {
#pragma unroll
    for (int out = 0; out < kWarpColumns; ++out) {
      rows[0][out] = rows[1][out] = rows[2][out] = bias;
    }
  }

  // The next row touches the output rows one further down.
  __device__ __forceinline__ void advance(float bias) {
#pragma unroll
    for (int out = 0; out < kWarpColumns; ++out) {
      rows[0][out] = rows[1][out];
      rows[1][out] = rows[2][out];
      rows[2][out] = bias;
    }
  }
};

// Writes kWarpColumns neighbouring pixels of one channel, row by row.
template <class T>
class GluWriter {
 public:
  __device__ __forceinline__ GluWriter(const DepthwiseGluArgs& args, const GluTile& tile, int64_t w,
                                       int64_t channel)
      : next_(static_cast<T*>(args.y) +
              ((tile.image * args.height + tile.top) * args.width + w) * args.channels + channel),
        row_stride_(args.width * args.channels),
        channels_(args.channels),
        columns_(channel < args.channels
                     ? static_cast<int>(min(args.width - w, int64_t{kWarpColumns}))
                     : 0) {}

  __device__ __forceinline__ void write(Activation activation, const float (&value)[kWarpColumns],
                                        float (&gate)[kWarpColumns]) {
    activate<T>(activation, gate);
#pragma unroll
    for (int i = 0; i < kWarpColumns; ++i) {
      if (i < columns_) next_[i * channels_] = from_float<T>(value[i] * gate[i]);
    }
    next_ += row_stride_;
  }

 private:
  T* next_;
  int64_t row_stride_;
  int64_t channels_;
  int columns_;
};

template <class T, bool kVectors>
__global__ void __launch_bounds__(kGluThreads, kVectors ? 3 : 2)
    depthwise_glu_kernel(DepthwiseGluArgs args) {
  KELIX_SHARED(GluRow, buffers, [2]);
  KELIX_SHARED(float, all_taps, [2][kGluChannels * kTaps]);
  const GluTile tile = glu_tile(args);
  const int lane = threadIdx.x % kWarpSize;
  const int first_column = threadIdx.x / kWarpSize * kWarpColumns;
  // What this thread loads of every row.
  const int load_half = threadIdx.x / (kGluColumns * kPixelPieces);
  const int load_column = threadIdx.x / kPixelPieces % kGluColumns;
  const int load_piece = threadIdx.x % kPixelPieces * kGluPiece;
  const bool has_sides = args.width > kGluColumns;

  ColumnReader<T, kVectors> reader(args, tile.image, tile.top - 1, tile.left + load_column,
                                   load_half, tile.channel + load_piece);
  T next[kGluPiece];
  reader.read(next);
  load_taps<T>(args, tile, all_taps);
  if (!has_sides && threadIdx.x < kGluChannels) {
    for (GluRow& row : buffers) {
      for (auto& half : row) half[0][lane] = half[kGluColumns + 1][lane] = 0.0f;
    }
  }
  __syncthreads();
  const int64_t channel = tile.channel + lane;
  float taps[2][kTaps];
  float bias[2];
  GluSums sums[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kTaps; ++i) taps[half][i] = all_taps[half][lane * kTaps + i];
    bias[half] = channel < args.channels
                     ? to_float(static_cast<const T*>(args.bias)[half * args.channels + channel])
                     : 0.0f;
    sums[half].start(bias[half]);
  }

  GluWriter<T> writer(args, tile, tile.left + first_column, channel);
  const int rows = static_cast<int>(tile.bottom - tile.top) + 2;
  for (int i = 0; i < rows; ++i) {
    GluRow& row = buffers[i & 1];
    store_activated(args.pre_act, next, &row[load_half][load_column + 1][load_piece]);
    if (has_sides) stage_sides<T, kVectors>(args, tile, tile.top - 1 + i, row);
    if (i + 1 < rows) reader.read(next);
    __syncthreads();  // the other buffer is free: all threads are past their sums of the row before
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[half].add(&row[half][first_column], taps[half]);
    if (i >= 2) writer.write(args.gate_act, sums[0].rows[0], sums[1].rows[0]);
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[half].advance(bias[half]);
  }
}

}  // namespace kelix::cuda
