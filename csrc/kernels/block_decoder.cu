#include "common/ceil_div.h"
#include "kernels/block_decoder.cuh"
#include "kernels/block_decoder.h"
#include "kernels/block_decoder_resident.h"

namespace kelix::cuda {
namespace {

// Of a map whose warps may take four outputs each and still fill the multiprocessors.
constexpr int64_t kManyOutputs = 8192;

template <class T>
struct Launcher {
  const BlockDecoderArgs& args;
  cudaStream_t stream;

  const T* packed(int64_t start) const { return static_cast<const T*>(args.weights) + start; }
  unsigned rows() const { return static_cast<unsigned>(args.batch); }

  template <int kOutputs, int kRows, class W>
  void linear_tiles(const LinearArgs<W>& linear) const {
    const dim3 grid(static_cast<unsigned>(ceil_div(linear.batch, kRows)),
                    static_cast<unsigned>(ceil_div(linear.out, kLinearWarps * kOutputs)));
    const int threads = kLinearWarps * kWarpSize;
    if (takes_wide_loads(linear)) {
      launch_kernel(linear_kernel<W, kOutputs, kRows, true>, grid, threads, 0, stream, linear);
    } else {
      launch_kernel(linear_kernel<W, kOutputs, kRows, false>, grid, threads, 0, stream, linear);
    }
  }

  void linear(const T* weight, const T* bias, const T* position, const float* x, const float* added,
              float* y, int64_t in, int64_t out) const {
    apply(LinearArgs<T>{weight, bias, position, x, added, y, in, out, args.batch, nullptr});
  }

  template <class W>
  void apply(const LinearArgs<W>& linear) const {
    if (linear.batch == 1) {
      linear_tiles<1, 1>(linear);
    } else if (linear.batch <= 4 || linear.out < kManyOutputs) {
      linear_tiles<1, 4>(linear);
    } else {
      linear_tiles<4, 8>(linear);
    }
  }

  // W: of the head's weights.
  template <class W>
  void head(const HeadSlice& slice) const {
    LinearArgs<W> linear{};
    linear.weight = static_cast<const W*>(args.head) + slice.first * args.input_dim;
    linear.x = args.work.output;
    linear.y = args.work.logits;
    linear.in = args.input_dim;
    linear.out = slice.width;
    linear.batch = args.batch;
    linear.scale = args.head_scale != nullptr ? args.head_scale + slice.first : nullptr;
    apply(linear);
  }

  void layer_norm(const T* weight, const T* bias) const {
    launch_kernel(decoder_layer_norm_kernel<T>, rows(), kDecoderThreads, 0, stream, args.work.x,
                  weight, bias, args.work.normed, args.d_model);
  }

  void layer(int64_t index, int64_t slot) const {
    const BlockDecoderLayout& at = args.layout;
    const BlockDecoderWorkspace& work = args.work;
    const T* weights = packed(at.first_layer + index * at.layer_size);
    const int64_t d = args.d_model, ffn = args.ffn;
    layer_norm(weights + at.sa_norm_weight, weights + at.sa_norm_bias);
    linear(weights + at.qkv_weight, weights + at.qkv_bias, nullptr, work.normed, nullptr, work.qkv,
           d, 3 * d);
    const dim3 heads(rows(), static_cast<unsigned>(args.num_heads));
    launch_kernel(slot_attention_kernel, heads, kWarpSize, 0, stream, args, index, slot);
    linear(weights + at.output_weight, weights + at.output_bias, nullptr, work.mixed, work.x,
           work.x, d, d);
    layer_norm(weights + at.mlp_norm_weight, weights + at.mlp_norm_bias);
    linear(weights + at.gate_up_weight, nullptr, nullptr, work.normed, nullptr, work.gate_up, d,
           2 * ffn);
    launch_kernel(decoder_silu_mul_kernel, rows(), kDecoderThreads, 0, stream, args);
    linear(weights + at.down_weight, nullptr, nullptr, work.activated, work.x, work.x, ffn, d);
  }

  void slot(int64_t slot) const {
    const BlockDecoderLayout& at = args.layout;
    const BlockDecoderWorkspace& work = args.work;
    const int64_t d = args.d_model, wide = args.input_dim;
    launch_kernel(slot_input_kernel<T>, rows(), kDecoderThreads, 0, stream, args, slot);
    linear(packed(at.input_weight), packed(at.input_bias), packed(at.position + slot * d),
           work.input, nullptr, work.x, wide, d);
    for (int64_t index = 0; index < args.num_layers; ++index) layer(index, slot);
    linear(packed(at.final_weight), packed(at.final_bias), nullptr, work.x, work.input, work.output,
           d, wide);
    launch_kernel(head_norm_kernel<T>, rows(), kDecoderThreads, 0, stream, args);
    const HeadSlice slice = head_slice(args, slot);
    if (args.head_scale != nullptr) {
      head<int8_t>(slice);
    } else {
      head<T>(slice);
    }
    draw(slot, slice.width);
  }

  void draw(int64_t slot, int64_t width) const {
    if (!is_wide(width)) {
      launch_kernel(draw_slot_kernel, rows(), kDrawThreads, 0, stream, args, slot);
      return;
    }
    const dim3 chunks(static_cast<unsigned>(wide_chunks(width)), rows());
    launch_kernel(summarise_slot_kernel, chunks, kDrawThreads, 0, stream, args, slot);
    launch_kernel(gather_slot_kernel, chunks, kDrawThreads, 0, stream, args, slot);
    launch_kernel(finish_slot_kernel, rows(), kDrawThreads, 0, stream, args, slot);
  }
};

}  // namespace

const char* block_decode(const BlockDecoderArgs& args, void* stream) {
  if (args.batch == 0) return nullptr;
  if (block_decode_resident(args, stream)) return launch_error();
  with_dtype(args.dtype, [&](auto type) {
    const Launcher<decltype(type)> launcher{args, static_cast<cudaStream_t>(stream)};
    for (int64_t slot = 0; slot < args.num_codes; ++slot) launcher.slot(slot);
  });
  return launch_error();
}

}  // namespace kelix::cuda
