// block_decode.
#include "cpu/block_decoder.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "common/ceil_div.h"
#include "common/sampling.h"
#include "kernels/block_decoder.h"
#include "ops/launch.h"

namespace kelix {
namespace {

constexpr int64_t kPackedAlign = 64;  // elements

BlockDecoderLayout packed_layout(int64_t d, int64_t layers, int64_t ffn, int64_t wide,
                                 int64_t slots) {
  BlockDecoderLayout at{};
  int64_t next = 0;
  const auto take = [&next](int64_t elements) {
    const int64_t start = next;
    next += ceil_div(elements, kPackedAlign) * kPackedAlign;
    return start;
  };
  at.input_weight = take(d * wide);
  at.input_bias = take(d);
  at.position = take(slots * d);
  at.first_layer = next;
  next = 0;
  at.sa_norm_weight = take(d);
  at.sa_norm_bias = take(d);
  at.qkv_weight = take(3 * d * d);
  at.qkv_bias = take(3 * d);
  at.output_weight = take(d * d);
  at.output_bias = take(d);
  at.mlp_norm_weight = take(d);
  at.mlp_norm_bias = take(d);
  at.gate_up_weight = take(2 * ffn * d);
  at.down_weight = take(d * ffn);
  at.layer_size = next;
  next = at.first_layer + layers * at.layer_size;
  at.final_weight = take(wide * d);
  at.final_bias = take(wide);
  at.size = next;
  return at;
}

// Hands out consecutive parts of one allocation, each on a 64-float boundary. The first pass, over
// no memory, measures.
class FloatArena {
 public:
  explicit FloatArena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* part = base_ != nullptr ? base_ + used_ : nullptr;
    used_ += (floats + 63) / 64 * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

BlockDecoderWorkspace carve(FloatArena& arena, const BlockDecoderArgs& args) {
  const int64_t rows = args.batch, d = args.d_model, wide = args.input_dim;
  const int64_t slice = args.text_vocab + args.codes;  // the widest: slot 0
  BlockDecoderWorkspace work{};
  work.input = arena.take(rows * wide);
  work.output = arena.take(rows * wide);
  work.x = arena.take(rows * d);
  work.normed = arena.take(rows * d);
  work.qkv = arena.take(rows * 3 * d);
  work.mixed = arena.take(rows * d);
  work.gate_up = arena.take(rows * 2 * args.ffn);
  work.activated = arena.take(rows * args.ffn);
  work.keys_values = arena.take(rows * args.num_layers * (args.num_codes + 1) * 2 * d);
  work.logits = arena.take(rows * slice);
  work.sampling = arena.take(rows * draw_workspace(slice));
  work.arrived = reinterpret_cast<uint32_t*>(arena.take(1));
  return work;
}

void check_ids(Check& check, int64_t vocab, int64_t num_codes, int64_t text_vocab,
               int64_t block_end, int64_t banned_id) {
  check.rule(num_codes >= 1, "num_codes", num_codes, "must be at least 1")
      .rule(text_vocab >= 1 && text_vocab < vocab, "text_vocab", text_vocab,
            "must be in [1, VT=", vocab, ")")
      .rule((vocab - text_vocab) % num_codes == 0, "head", vocab,
            "must have text_vocab + num_codes * K = ", text_vocab, " + ", num_codes, " * K rows")
      .rule(block_end >= 0 && block_end < text_vocab, "block_end", block_end,
            "must be a text id in [0, text_vocab=", text_vocab, ")")
      .rule(banned_id >= -1 && banned_id < text_vocab, "banned_id", banned_id,
            "must be -1 (none) or a text id below text_vocab=", text_vocab)
      .rule(vocab <= std::numeric_limits<int32_t>::max(), "head", vocab,
            "must have VT < 2^31 rows");
}

void check_sizes(Check& check, int64_t d_model, int64_t num_heads, int64_t num_layers,
                 int64_t ffn) {
  const auto at_least_one = [&check](int64_t value, const char* name) {
    check.rule(value >= 1, name, value, "must be at least 1");
  };
  at_least_one(d_model, "d_model");
  at_least_one(num_heads, "num_heads");
  at_least_one(num_layers, "num_layers");
  at_least_one(ffn, "ffn");
  check.rule(d_model % num_heads == 0, "num_heads", num_heads, "must divide d_model=", d_model);
}

std::tuple<Tensor, Tensor> block_decode(const Tensor& hidden, const Tensor& weights,
                                        const Tensor& table, const Tensor& head_norm,
                                        const Tensor& head, const Tensor& params,
                                        const Tensor& seeds, const Tensor& steps, int64_t num_codes,
                                        int64_t text_vocab, int64_t block_end, int64_t banned_id,
                                        int64_t d_model, int64_t num_heads, int64_t num_layers,
                                        int64_t ffn, double norm_eps,
                                        const std::optional<Tensor>& head_scale) {
  Check check("block_decode");
  check.shape(hidden, "hidden", {"B", "D"})
      .storage(hidden, "hidden")
      .shape(table, "table", {"VT", "D"})
      .storage(table, "table")
      .shape(head_norm, "head_norm", {"D"})
      .storage(head_norm, "head_norm")
      .shape(head, "head", {"VT", "D"});
  if (head_scale.has_value()) {
    check.dtype(head, "head", ScalarType::Char)
        .shape(*head_scale, "head_scale", {"VT"})
        .dtype(*head_scale, "head_scale", ScalarType::Float);
  } else {
    check.storage(head, "head");
  }
  check_ids(check, check["VT"], num_codes, text_vocab, block_end, banned_id);
  check_sizes(check, d_model, num_heads, num_layers, ffn);
  const int64_t batch = check["B"], wide = check["D"];
  check.rule(wide >= 1, "hidden", hidden, "must have D >= 1");
  const BlockDecoderLayout layout = packed_layout(d_model, num_layers, ffn, wide, num_codes + 1);
  check.shape(weights, "weights", {Dim("packed", layout.size)})
      .storage(weights, "weights")
      .shape(params, "params", {"B", Dim("N+1", num_codes + 1), 4})
      .dtype(params, "params", ScalarType::Float)
      .shape(seeds, "seeds", {"B"})
      .dtype(seeds, "seeds", ScalarType::Long)
      .shape(steps, "steps", {"B"})
      .dtype(steps, "steps", ScalarType::Long);

  const Tensor input = dense(hidden), packed = dense(weights), embeddings = dense(table);
  const Tensor gain = dense(head_norm), output = dense(head), rules = dense(params);
  const Tensor seed = dense(seeds), step = dense(steps);
  const std::optional<Tensor> scale = dense(head_scale);
  Tensor ids = new_tensor({batch, num_codes + 1}, ScalarType::Long, input);
  Tensor logprobs = new_tensor({batch, num_codes + 1}, ScalarType::Float, input);
  if (batch == 0) return {ids, logprobs};

  BlockDecoderArgs args{};
  args.hidden = data(input);
  args.weights = data(packed);
  args.table = data(embeddings);
  args.head_norm = data(gain);
  args.head = data(output);
  args.head_scale = static_cast<const float*>(data(scale));
  args.params = static_cast<const float*>(data(rules));
  args.seeds = static_cast<const int64_t*>(data(seed));
  args.steps = static_cast<const int64_t*>(data(step));
  args.ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  args.logprobs = static_cast<float*>(logprobs.mutable_data_ptr());
  args.layout = layout;
  args.batch = batch;
  args.input_dim = wide;
  args.num_codes = num_codes;
  args.text_vocab = text_vocab;
  args.codes = (check["VT"] - text_vocab) / num_codes;
  args.block_end = block_end;
  args.banned_id = banned_id;
  args.d_model = d_model;
  args.num_heads = num_heads;
  args.num_layers = num_layers;
  args.ffn = ffn;
  args.norm_eps = static_cast<float>(norm_eps);
  args.dtype = check.storage_type();

  FloatArena measured(nullptr);
  carve(measured, args);
  Tensor floats = new_tensor({measured.used()}, ScalarType::Float, input);
  Tensor rows = new_tensor({batch}, ScalarType::Long, input);
  FloatArena arena(static_cast<float*>(floats.mutable_data_ptr()));
  args.work = carve(arena, args);
  args.work.active = static_cast<int64_t*>(rows.mutable_data_ptr());
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("block_decode", input, block_decode, args);
  } else {
    KELIX_CPU(block_decode)(args, torch_parallel_for());
  }
  return {ids, logprobs};
}

}  // namespace
}  // namespace kelix

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) {
  m.impl("block_decode", TORCH_BOX(&kelix::block_decode));
}
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) {
  m.impl("block_decode", TORCH_BOX(&kelix::block_decode));
}
