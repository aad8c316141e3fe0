// depthwise_glu of the diffusion stem. The vector lanes run over channels; an activated row is
// kept while the three output rows that read it are computed.
#include "cpu/depthwise_tile.h"

namespace kelix::KELIX_ISA {
namespace {

Piece piece_at(const DepthwiseGluArgs& args, int64_t index) {
  const int64_t blocks = (args.channels + kBlock - 1) / kBlock;
  const int64_t bands = (args.height + kDepthwiseRows - 1) / kDepthwiseRows;
  Piece piece = channel_block(args, index % blocks);
  piece.top = index / blocks % bands * kDepthwiseRows;
  piece.image = index / blocks / bands;
  const int64_t rows = args.height - piece.top;
  piece.bottom = piece.top + (rows < kDepthwiseRows ? rows : kDepthwiseRows);
  return piece;
}

template <class T>
void run_piece(const DepthwiseGluArgs& args, const Piece& piece, float* workspace) {
  const int64_t row_floats = (args.width + 2) * 2 * piece.width;
  float* values = workspace + 3 * row_floats;
  float* gates = values + args.width * piece.width;
  float weight[2 * kTaps * kBlock];
  float bias[2 * kBlock];
  load_weights<T>(args, piece, weight, bias);
  // Row h lies in ring slot (h + 1) % 3: -1 is a row too.
  for (int64_t h = piece.top - 1; h <= piece.top; ++h) {
    load_row<T>(args, piece, h, workspace + (h + 1) % 3 * row_floats);
  }
  for (int64_t h = piece.top; h < piece.bottom; ++h) {
    load_row<T>(args, piece, h + 1, workspace + (h + 2) % 3 * row_floats);
    const float* const rows[3] = {workspace + h % 3 * row_floats,
                                  workspace + (h + 1) % 3 * row_floats,
                                  workspace + (h + 2) % 3 * row_floats};
    convolve_row(rows, weight, bias, 0, args.width, piece.width, values);
    convolve_row(rows, weight, bias, 1, args.width, piece.width, gates);
    activate(args.gate_act, gates, args.width * piece.width);
    T* y = static_cast<T*>(args.y) + (piece.image * args.height + h) * args.width * args.channels +
           piece.first;
    for (int64_t w = 0; w < args.width; ++w) {
#pragma omp simd
      for (int64_t c = 0; c < piece.size; ++c) {
        y[w * args.channels + c] =
            from_float<T>(values[w * piece.width + c] * gates[w * piece.width + c]);
      }
    }
  }
}

}  // namespace

void depthwise_glu(const DepthwiseGluArgs& args, int64_t begin, int64_t end) {
  for (int64_t slot = begin; slot < end; ++slot) {
    float* workspace = args.workspace + slot * depthwise_slot_floats(args.width);
    for (int64_t index = slot; index < depthwise_pieces(args); index += args.slots) {
      with_dtype(args.dtype, [&](auto type) {
        run_piece<decltype(type)>(args, piece_at(args, index), workspace);
      });
    }
  }
}

}  // namespace kelix::KELIX_ISA
