// Gradient of depthwise_glu, a block of channels of a whole picture at a time: the convolution is
// computed anew, and its gradient is a convolution with turned taps.
#include "cpu/depthwise_tile.h"
#include "cpu/gradients.h"

namespace kelix::KELIX_ISA {
namespace {

// y = act(x) and slope = act'(x); y may be x.
void activate_with_slope(Activation activation, const float* x, int64_t count, float* y,
                         float* slope) {
  if (activation == Activation::kSilu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float sigmoid = sigmoid_simd(x[i]);
      const float value = x[i] * sigmoid;
      y[i] = value;
      slope[i] = sigmoid + value * (1.0f - sigmoid);
    }
  } else if (activation == Activation::kGelu) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float value = x[i];
      const float below = 0.5f * (1.0f + erf_simd(value * 0.70710678f));
      y[i] = value * below;
      slope[i] = below + value * 0.39894228f * exp_simd(-0.5f * value * value);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      y[i] = x[i];
      slope[i] = 1.0f;
    }
  }
}

// The picture of one piece: rows of [width + 2][2][lanes] with zeros all around it, and rows of
// [width][2][lanes] where nothing is read beyond it.
struct Planes {
  float* activated;
  float* sums;    // gradients of the convolution's results
  float* slopes;  // of the activation in front
  float* row;     // three rows of [width][lanes]: values, gates, and what becomes of the gates
  int64_t outer;  // floats of a row with its border
  int64_t inner;  // and without

  float* activated_row(int64_t h) const { return activated + (h + 1) * outer; }
  float* sums_row(int64_t h) const { return sums + (h + 1) * outer; }
};

void clear(float* begin, int64_t count) {
  std::memset(begin, 0, static_cast<size_t>(count) * sizeof(float));
}

Planes planes_of(const DepthwiseGluArgs& args, const Piece& piece, float* workspace) {
  const int64_t pixel = 2 * piece.width;
  Planes planes;
  planes.outer = (args.width + 2) * pixel;
  planes.inner = args.width * pixel;
  planes.activated = workspace;
  planes.sums = planes.activated + (args.height + 2) * planes.outer;
  planes.slopes = planes.sums + (args.height + 2) * planes.outer;
  planes.row = planes.slopes + args.height * planes.inner;
  float* const bordered[] = {planes.activated, planes.sums};
  for (float* plane : bordered) {
    clear(plane, planes.outer + pixel);
    for (int64_t h = 1; h <= args.height; ++h) {
      clear(plane + (h + 1) * planes.outer - pixel, 2 * pixel);
    }
    clear(plane + (args.height + 1) * planes.outer + pixel, planes.inner + pixel);
  }
  return planes;
}

// Fills row h of `activated` and `slopes`; lanes past the channels are those of zeros.
void activate_row(const DepthwiseGluArgs& args, const Piece& piece, int64_t h,
                  const Planes& planes) {
  const int64_t lanes = piece.width;
  const float* x = static_cast<const float*>(args.x) +
                   (piece.image * args.height + h) * args.width * 2 * args.channels + piece.first;
  float* activated = planes.activated_row(h) + 2 * lanes;
  float* slopes = planes.slopes + h * planes.inner;
  for (int64_t i = 0; i < 2 * args.width; ++i) {
    activate_with_slope(args.pre_act, x + i * args.channels, piece.size, activated + i * lanes,
                        slopes + i * lanes);
    clear(activated + i * lanes + piece.size, lanes - piece.size);
  }
}

// Fills row h of `sums`: of out = value * act(gate), d value = grad * act(gate) and
// d gate = grad * value * act'(gate).
void backward_of_gate(const DepthwiseGluBackwardArgs& args, const Piece& piece, int64_t h,
                      const float* weight, const float* bias, const Planes& planes) {
  const DepthwiseGluArgs& forward = args.forward;
  const int64_t lanes = piece.width, width = forward.width;
  const float* const rows[3] = {planes.activated_row(h - 1), planes.activated_row(h),
                                planes.activated_row(h + 1)};
  float* values = planes.row;
  float* gates = values + width * lanes;
  float* slopes = gates + width * lanes;
  convolve_row(rows, weight, bias, 0, width, lanes, values);
  convolve_row(rows, weight, bias, 1, width, lanes, gates);
  activate_with_slope(forward.gate_act, gates, width * lanes, gates, slopes);
  float* target = planes.sums_row(h) + 2 * lanes;
  const float* grad =
      args.grad + (piece.image * forward.height + h) * width * forward.channels + piece.first;
  for (int64_t w = 0; w < width; ++w) {
    float* dvalue = target + w * 2 * lanes;
    float* dgate = dvalue + lanes;
    const float* upstream = grad + w * forward.channels;
    const int64_t place = w * lanes;
#pragma omp simd
    for (int64_t c = 0; c < piece.size; ++c) {
      dvalue[c] = upstream[c] * gates[place + c];
      dgate[c] = upstream[c] * values[place + c] * slopes[place + c];
    }
    clear(dvalue + piece.size, lanes - piece.size);
    clear(dgate + piece.size, lanes - piece.size);
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
          const float* x = around + tap / 3 * planes.outer + (w + tap % 3) * pixel;
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
      const float* own = planes.row + w * lanes;
      const float* slopes = planes.slopes + h * planes.inner + (2 * w + half) * lanes;
      float* dx = args.dx + (2 * pixel + half) * forward.channels + piece.first;
#pragma omp simd
      for (int64_t c = 0; c < piece.size; ++c) dx[c] = own[c] * slopes[c];
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
  const int64_t height = args.forward.height;
  const Planes planes = planes_of(args.forward, piece, workspace);
  for (int64_t h = 0; h < height; ++h) activate_row(args.forward, piece, h, planes);
  for (int64_t h = 0; h < height; ++h) backward_of_gate(args, piece, h, weight, bias, planes);
  for (int64_t half = 0; half < 2; ++half) backward_of_taps(args, piece, half, planes);
  for (int64_t h = 0; h < height; ++h) backward_of_row(args, piece, h, turned, no_bias, planes);
}

}  // namespace

void depthwise_glu_backward(const DepthwiseGluBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.forward.channels + kBlock - 1) / kBlock;
  // One workspace for the whole range: memory that nobody touches costs nothing.
  float* workspace =
      args.workspace + begin * depthwise_backward_floats(args.forward.height, args.forward.width);
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int64_t index = slot; index < args.forward.batch * blocks; index += args.forward.slots) {
      Piece piece = channel_block(args.forward, index % blocks);
      piece.image = index / blocks;
      run_piece(args, piece, workspace);
    }
  }
}

}  // namespace kelix::KELIX_ISA
