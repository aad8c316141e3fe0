#include "cpu/block_decoder.h"

#include <cmath>

#include "cpu/product.h"
#include "cpu/row_sampler.h"
#include "cpu/row_stats.h"

namespace kelix::KELIX_ISA {
namespace {

// One call. Rows that are done leave the batch: buffers hold the `count` active rows without gaps,
// only keys and values stay at the row's own place.
template <class T>
struct Decoder {
  const BlockDecoderArgs& args;
  const ParallelFor& parallel;
  int64_t count;

  const T* packed(int64_t start) const { return static_cast<const T*>(args.weights) + start; }

  void apply(const T* weight, const T* bias, const float* x, const float* added, float* y,
             int64_t in, int64_t out) const {
    linear(Linear<T>{weight, bias, x, added, y, in, out, count}, parallel);
  }

  // Calls f(i) for the active rows; `work` is about the number of operations of one.
  template <class F>
  void each_row(int64_t work, const F& f) const {
    parallel(count, 1 + 32768 / (work + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }
};

template <class T>
void layer_norm_row(const float* x, const T* weight, const T* bias, float* y, int64_t cols) {
  const RowStats stats = row_stats(x, cols, kDecoderNormEps);
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    y[c] = stats.normed(x[c]) * to_float(weight[c]) + to_float(bias[c]);
  }
}

template <class T>
void rms_norm_row(float* x, const T* weight, int64_t cols, float eps) {
  const float scale = 1.0f / std::sqrt(mean_square(x, cols) + eps);
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) x[c] = x[c] * scale * to_float(weight[c]);
}

// One row's attention over its slots 0..slot. cache: [slots, 2 d], keys then values, of this layer.
void attend_row(const float* qkv, float* cache, float* mixed, int64_t slot, int64_t d,
                int64_t num_heads) {
  float* own = cache + slot * 2 * d;
#pragma omp simd
  for (int64_t c = 0; c < 2 * d; ++c) own[c] = qkv[d + c];
  const int64_t head_dim = d / num_heads;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t head = 0; head < num_heads; ++head) {
    const float* q = qkv + head * head_dim;
    float* out = mixed + head * head_dim;
    float top = -__builtin_inff(), total = 0;
    for (int64_t c = 0; c < head_dim; ++c) out[c] = 0;
    for (int64_t s = 0; s <= slot; ++s) {
      const float* key = cache + s * 2 * d + head * head_dim;
      const float* value = key + d;
      float score = 0;
#pragma omp simd reduction(+ : score)
      for (int64_t c = 0; c < head_dim; ++c) score += q[c] * key[c];
      score *= scale;
      const float raised = score > top ? score : top;
      const float keep = std::exp(top - raised), weight = std::exp(score - raised);
      total = total * keep + weight;
      top = raised;
#pragma omp simd
      for (int64_t c = 0; c < head_dim; ++c) out[c] = out[c] * keep + weight * value[c];
    }
    const float inverse = 1.0f / total;
    for (int64_t c = 0; c < head_dim; ++c) out[c] *= inverse;
  }
}

template <class T>
void decoder_layer(const Decoder<T>& run, int64_t layer, int64_t slot) {
  const BlockDecoderArgs& args = run.args;
  const BlockDecoderWorkspace& work = args.work;
  const BlockDecoderLayout& at = args.layout;
  const T* weights = run.packed(at.first_layer + layer * at.layer_size);
  const int64_t d = args.d_model, ffn = args.ffn, slots = args.num_codes + 1;

  run.each_row(8 * d, [&](int64_t i) {
    layer_norm_row(work.x + i * d, weights + at.sa_norm_weight, weights + at.sa_norm_bias,
                   work.normed + i * d, d);
  });
  run.apply(weights + at.qkv_weight, weights + at.qkv_bias, work.normed, nullptr, work.qkv, d,
            3 * d);
  run.each_row(4 * d * (slot + 1), [&](int64_t i) {
    const int64_t row = work.active[i];
    float* cache = work.keys_values + (row * args.num_layers + layer) * slots * 2 * d;
    attend_row(work.qkv + i * 3 * d, cache, work.mixed + i * d, slot, d, args.num_heads);
  });
  run.apply(weights + at.output_weight, weights + at.output_bias, work.mixed, work.x, work.x, d, d);

  run.each_row(8 * d, [&](int64_t i) {
    layer_norm_row(work.x + i * d, weights + at.mlp_norm_weight, weights + at.mlp_norm_bias,
                   work.normed + i * d, d);
  });
  run.apply(weights + at.gate_up_weight, static_cast<const T*>(nullptr), work.normed, nullptr,
            work.gate_up, d, 2 * ffn);
  run.each_row(16 * ffn, [&](int64_t i) {
    const float* gate = work.gate_up + i * 2 * ffn;
    const float* up = gate + ffn;
    float* out = work.activated + i * ffn;
#pragma omp simd
    for (int64_t c = 0; c < ffn; ++c) out[c] = silu_simd(gate[c]) * up[c];
  });
  run.apply(weights + at.down_weight, static_cast<const T*>(nullptr), work.activated, work.x,
            work.x, ffn, d);
}

// The last product of a slot, of the rows of the head that it admits. W: of the head's weights.
template <class W, class T>
void head_products(const Decoder<T>& run, const HeadSlice& slice) {
  const BlockDecoderArgs& args = run.args;
  const W* head = static_cast<const W*>(args.head) + slice.first * args.input_dim;
  const float* scale = args.head_scale != nullptr ? args.head_scale + slice.first : nullptr;
  linear(Linear<W>{head, nullptr, args.work.output, nullptr, args.work.logits, args.input_dim,
                   slice.width, run.count, scale},
         run.parallel);
}

// Fills work.logits [active, slice width] of the slot from work.input [active, D].
template <class T>
void slot_logits(const Decoder<T>& run, int64_t slot) {
  const BlockDecoderArgs& args = run.args;
  const BlockDecoderWorkspace& work = args.work;
  const BlockDecoderLayout& at = args.layout;
  const int64_t d = args.d_model, wide = args.input_dim;
  run.apply(run.packed(at.input_weight), run.packed(at.input_bias), work.input, nullptr, work.x,
            wide, d);
  const T* position = run.packed(at.position) + slot * d;
  for (int64_t i = 0; i < run.count; ++i) {
    float* x = work.x + i * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) x[c] += to_float(position[c]);
  }
  for (int64_t layer = 0; layer < args.num_layers; ++layer) decoder_layer(run, layer, slot);
  run.apply(run.packed(at.final_weight), run.packed(at.final_bias), work.x, work.input, work.output,
            d, wide);
  const T* head_norm = static_cast<const T*>(args.head_norm);
  run.each_row(8 * wide, [&](int64_t i) {
    rms_norm_row(work.output + i * wide, head_norm, wide, args.norm_eps);
  });
  const HeadSlice slice = head_slice(args, slot);
  if (args.head_scale != nullptr) return head_products<int8_t>(run, slice);
  head_products<T>(run, slice);
}

template <class T>
void draw_slot(const Decoder<T>& run, int64_t slot) {
  const BlockDecoderArgs& args = run.args;
  const HeadSlice slice = head_slice(args, slot);
  const int64_t slots = args.num_codes + 1;
  run.each_row(8 * slice.width, [&](int64_t i) {
    const int64_t row = args.work.active[i];
    float* logits = args.work.logits + i * slice.width;
    if (slot == 0 && args.banned_id >= 0) logits[args.banned_id] = -__builtin_inff();
    const float* params = args.params + (row * slots + slot) * 4;
    const DrawRule rule{params[0],       params[1], params[2],   params[3], args.seeds[row],
                        args.steps[row], slot,      slice.first, false};
    float* workspace = args.work.sampling + i * draw_workspace(slice.width);
    const Drawn drawn = draw_row(logits, slice.width, rule, workspace);
    args.ids[row * slots + slot] = drawn.id;
    args.logprobs[row * slots + slot] = drawn.logprob;
  });
}

// The ids after a text id or a failure are known; other rows go on with the embedding of their id.
template <class T>
int64_t advance(const Decoder<T>& run, int64_t slot) {
  const BlockDecoderArgs& args = run.args;
  const int64_t slots = args.num_codes + 1, wide = args.input_dim;
  int64_t still = 0;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t row = args.work.active[i];
    int64_t* ids = args.ids + row * slots;
    float* logprobs = args.logprobs + row * slots;
    const bool failed = ids[slot] < 0;
    for (int64_t rest = slot + 1; rest < slots; ++rest) {
      ids[rest] = failed ? -1 : args.block_end;
      logprobs[rest] = failed ? __builtin_nanf("") : 0.0f;
    }
    if (failed || (slot == 0 && ids[0] < args.text_vocab)) continue;
    const T* embedding = static_cast<const T*>(args.table) + ids[slot] * wide;
    float* input = args.work.input + still * wide;
#pragma omp simd
    for (int64_t c = 0; c < wide; ++c) input[c] = to_float(embedding[c]);
    args.work.active[still++] = row;
  }
  return still;
}

template <class T>
void decode(const BlockDecoderArgs& args, const ParallelFor& parallel) {
  Decoder<T> run{args, parallel, args.batch};
  const T* hidden = static_cast<const T*>(args.hidden);
  for (int64_t i = 0; i < args.batch * args.input_dim; ++i)
    args.work.input[i] = to_float(hidden[i]);
  for (int64_t row = 0; row < args.batch; ++row) args.work.active[row] = row;
  for (int64_t slot = 0; slot < args.num_codes && run.count > 0; ++slot) {
    slot_logits(run, slot);
    draw_slot(run, slot);
    run.count = advance(run, slot);
  }
}

}  // namespace

void block_decode(const BlockDecoderArgs& args, const ParallelFor& parallel) {
  with_dtype(args.dtype, [&](auto type) { decode<decltype(type)>(args, parallel); });
}

}  // namespace kelix::KELIX_ISA
