// Gradient of depthwise_glu, a block of channels of a whole picture at a time: the convolution is
// computed anew, and its gradient is a convolution with turned taps.
#include "cpu/depthwise_tile.h"
#include "cpu/gradients.h"

namespace kelix::KELIX_ISA {
namespace {

// grad[i] *= act'(x[i])
void times_derivative(Activation activation, const float* x, int64_t count, float* grad) {
  if (activation == Activation::kSilu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float sigmoid = 1.0f / (1.0f + exp_simd(-x[i]));
      grad[i] *= sigmoid + x[i] * sigmoid * (1.0f - sigmoid);
    }
  } else if (activation == Activation::kGelu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float density = 0.39894228f * exp_simd(-0.5f * x[i] * x[i]);
      grad[i] *= 0.5f * (1.0f + erf_simd(x[i] * 0.70710678f)) + x[i] * density;
    }
  }
}

// The picture of one piece: rows of [width + 2][2][lanes], a row of zeros above and below.
struct Planes {
  float* activated;
  float* sums;  // gradients of the convolution's results
  float* row;   // [2][width][lanes]: one row of its results
  int64_t row_floats;

  float* activated_row(int64_t h) const { return activated + (h + 1) * row_floats; }
  float* sums_row(int64_t h) const { return sums + (h + 1) * row_floats; }
};

Planes planes_of(const DepthwiseGluArgs& args, const Piece& piece, float* workspace) {
  Planes planes;
  planes.row_floats = (args.width + 2) * 2 * piece.width;
  planes.activated = workspace;
  planes.sums = workspace + (args.height + 2) * planes.row_floats;
  planes.row = planes.sums + (args.height + 2) * planes.row_floats;
  std::memset(planes.sums, 0,
              static_cast<size_t>((args.height + 2) * planes.row_floats) * sizeof(float));
  for (int64_t h = -1; h <= args.height; ++h) {
    load_row<float>(args, piece, h, planes.activated_row(h));
  }
  return planes;
}

// Fills sums_row(h): of out = value * act(gate), d value = grad * act(gate) and
// d gate = grad * value * act'(gate).
void backward_of_gate(const DepthwiseGluBackwardArgs& args, const Piece& piece, int64_t h,
                      const float* weight, const float* bias, const Planes& planes) {
  const DepthwiseGluArgs& forward = args.forward;
  const int64_t lanes = piece.width, width = forward.width;
  const float* const rows[3] = {planes.activated_row(h - 1), planes.activated_row(h),
                                planes.activated_row(h + 1)};
  float* values = planes.row;
  float* gates = planes.row + width * lanes;
  convolve_row(rows, weight, bias, 0, width, lanes, values);
  convolve_row(rows, weight, bias, 1, width, lanes, gates);
  float* target = planes.sums_row(h) + 2 * lanes;
  const float* grad =
      args.grad + (piece.image * forward.height + h) * width * forward.channels + piece.first;
  for (int64_t w = 0; w < width; ++w) {
    float* dvalue = target + w * 2 * lanes;
    float* dgate = dvalue + lanes;
    const float* upstream = grad + w * forward.channels;
#pragma omp simd
    for (int64_t c = 0; c < piece.size; ++c) {
      dvalue[c] = gates[w * lanes + c];
      dgate[c] = upstream[c] * values[w * lanes + c];
    }
    activate(forward.gate_act, dvalue, piece.size);
    times_derivative(forward.gate_act, gates + w * lanes, piece.size, dgate);
#pragma omp simd
    for (int64_t c = 0; c < piece.size; ++c) dvalue[c] *= upstream[c];
  }
}

// Adds up the gradients of the taps and the bias of one half.
void backward_of_taps(const DepthwiseGluBackwardArgs& args, const Piece& piece, int64_t half,
                      const Planes& planes) {
  const DepthwiseGluArgs& forward = args.forward;
  const int64_t lanes = piece.width, pixel = 2 * lanes;
  float taps[(kTaps + 1) * kBlock];
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    Vector sums[kTaps + 1] = {};
    for (int64_t h = 0; h < forward.height; ++h) {
      const float* grads = planes.sums_row(h) + pixel + half * lanes + lane;
      const float* around = planes.activated_row(h - 1) + half * lanes + lane;
      for (int64_t w = 0; w < forward.width; ++w) {
        const Vector grad = *reinterpret_cast<const Vector*>(grads + w * pixel);
#pragma GCC unroll 9
        for (int tap = 0; tap < kTaps; ++tap) {
          const float* x = around + tap / 3 * planes.row_floats + (w + tap % 3) * pixel;
          sums[tap] += grad * *reinterpret_cast<const Vector*>(x);
        }
        sums[kTaps] += grad;
      }
    }
    for (int tap = 0; tap <= kTaps; ++tap) {
      *reinterpret_cast<Vector*>(taps + tap * kBlock + lane) = sums[tap];
    }
  }
  const int64_t channel = (piece.image * 2 + half) * forward.channels + piece.first;
  for (int64_t c = 0; c < piece.size; ++c) {
    for (int tap = 0; tap < kTaps; ++tap) {
      args.dweight[(channel + c) * kTaps + tap] = taps[tap * kBlock + c];
    }
    args.dbias[channel + c] = taps[kTaps * kBlock + c];
  }
}

// dx of row h: the sums convolved with the taps in the opposite order, times pre_act'(x).
void backward_of_row(const DepthwiseGluBackwardArgs& args, const Piece& piece, int64_t h,
                     const float* turned, const float* no_bias, const Planes& planes) {
  const DepthwiseGluArgs& forward = args.forward;
  const int64_t lanes = piece.width, width = forward.width;
  const float* const rows[3] = {planes.sums_row(h - 1), planes.sums_row(h), planes.sums_row(h + 1)};
  for (int64_t half = 0; half < 2; ++half) {
    convolve_row(rows, turned, no_bias, half, width, lanes, planes.row);
    for (int64_t w = 0; w < width; ++w) {
      const int64_t pixel = (piece.image * forward.height + h) * width + w;
      const int64_t start = (2 * pixel + half) * forward.channels + piece.first;
      float* own = planes.row + w * lanes;
      times_derivative(forward.pre_act, static_cast<const float*>(forward.x) + start, piece.size,
                       own);
      std::memcpy(args.dx + start, own, static_cast<size_t>(piece.size) * sizeof(float));
    }
  }
}

void run_piece(const DepthwiseGluBackwardArgs& args, const Piece& piece, float* workspace) {
  float weight[2 * kTaps * kBlock];
  float turned[2 * kTaps * kBlock];
  float bias[2 * kBlock];
  const float no_bias[2 * kBlock] = {};
  load_weights<float>(args.forward, piece, weight, bias);
  for (int64_t half = 0; half < 2; ++half) {
    for (int tap = 0; tap < kTaps; ++tap) {
      std::memcpy(turned + (half * kTaps + kTaps - 1 - tap) * kBlock,
                  weight + (half * kTaps + tap) * kBlock, kBlock * sizeof(float));
    }
  }
  const Planes planes = planes_of(args.forward, piece, workspace);
  for (int64_t h = 0; h < args.forward.height; ++h) {
    backward_of_gate(args, piece, h, weight, bias, planes);
  }
  for (int64_t half = 0; half < 2; ++half) backward_of_taps(args, piece, half, planes);
  for (int64_t h = 0; h < args.forward.height; ++h) {
    backward_of_row(args, piece, h, turned, no_bias, planes);
  }
}

}  // namespace

void depthwise_glu_backward(const DepthwiseGluBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.forward.channels + kBlock - 1) / kBlock;
  // One workspace for the whole range: memory that nobody touches costs nothing.
  float* workspace =
      args.workspace + begin * depthwise_backward_floats(args.forward.height, args.forward.width);
  for (int64_t index = begin; index < end; ++index) {
    Piece piece = channel_block(args.forward, index % blocks);
    piece.image = index / blocks;
    run_piece(args, piece, workspace);
  }
}

}  // namespace kelix::KELIX_ISA
