// norm_backward, silu_mul_backward, relu_linear_attention_backward, depthwise_glu_backward: what
// autograd calls on a CPU. Shapes and dtypes are those that the forward operators have checked.
#include "cpu/gradients.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/ceil_div.h"
#include "ops/launch.h"

namespace kelix {
namespace {

// Workers that have a workspace each, at most.
constexpr int64_t kMaxWorkers = 64;

const float* floats(const Tensor& tensor) { return static_cast<const float*>(data(tensor)); }
float* floats_of(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                         const std::optional<Tensor>& gain, int64_t group,
                                         bool centred, double eps) {
  Check check("norm_backward");
  check.shape(x, "x", {"rows", "D"})
      .shape(grad, "grad", {"rows", "D"})
      .dtype(x, "x", ScalarType::Float)
      .dtype(grad, "grad", ScalarType::Float);
  const int64_t rows = check["rows"];
  check.rule(group > 0 && rows % group == 0, "group", group, "must divide the rows of x");
  if (gain) {
    check.shape(*gain, "gain", {{"groups", rows / group}, "D"})
        .dtype(*gain, "gain", ScalarType::Float);
  }
  const Tensor input = dense(x);
  const Tensor upstream = dense(grad);
  const auto gains = dense(gain);
  const int64_t pieces = ceil_div(group, kGradientRows);
  Tensor dx = new_like(input);
  Tensor sums = new_tensor({rows / group, pieces, 2, check["D"]}, ScalarType::Float, input);
  const NormBackwardArgs args{floats(upstream),
                              floats(input),
                              gains ? floats(*gains) : nullptr,
                              floats_of(dx),
                              floats_of(sums),
                              rows,
                              check["D"],
                              group,
                              pieces,
                              centred,
                              static_cast<float>(eps)};
  run_parallel(rows / group * pieces, row_grain(kGradientRows * args.cols),
               KELIX_CPU(norm_backward), args);
  return {dx, sums};
}

Tensor silu_mul_backward(const Tensor& grad, const Tensor& x) {
  Check check("silu_mul_backward");
  check.shape(x, "x", {"rows", "2F"})
      .rule(check["2F"] % 2 == 0, "x", x, "must have an even last dimension")
      .shape(grad, "grad", {"rows", {"F", check["2F"] / 2}})
      .dtype(x, "x", ScalarType::Float)
      .dtype(grad, "grad", ScalarType::Float);
  const Tensor input = dense(x);
  const Tensor upstream = dense(grad);
  Tensor dx = new_like(input);
  const SiluMulBackwardArgs args{floats(upstream), floats(input), floats_of(dx), check["rows"],
                                 check["F"]};
  run_parallel(args.rows, row_grain(2 * args.cols), KELIX_CPU(silu_mul_backward), args);
  return dx;
}

Tensor relu_linear_attention_backward(const Tensor& grad, const Tensor& qkv, int64_t head_dim,
                                      double eps) {
  Check check("relu_linear_attention_backward");
  check.shape(grad, "grad", {"B", "N", "C"})
      .shape(qkv, "qkv", {"B", "N", {"3C", 3 * check["C"]}})
      .dtype(grad, "grad", ScalarType::Float)
      .dtype(qkv, "qkv", ScalarType::Float)
      .rule(head_dim > 0 && check["C"] % head_dim == 0, "head_dim", head_dim, "must divide C");
  const Tensor input = dense(qkv);
  const Tensor upstream = dense(grad);
  Tensor dqkv = new_like(input);
  const int64_t heads = check["C"] / head_dim;
  const int64_t stride = ceil_div(head_dim, kStatePad) * kStatePad;
  const int64_t slots = std::min(check["B"] * heads, kMaxWorkers);
  Tensor workspace = new_tensor({slots, linear_attention_backward_floats(check["N"], stride)},
                                ScalarType::Float, input);
  const LinearAttentionBackwardArgs args{floats(upstream),
                                         floats(input),
                                         floats_of(dqkv),
                                         floats_of(workspace),
                                         check["B"],
                                         check["N"],
                                         heads,
                                         head_dim,
                                         stride,
                                         slots,
                                         static_cast<float>(eps)};
  const int64_t heads_of_a_slot = ceil_div(args.batch * heads, std::max<int64_t>(1, slots));
  run_parallel(slots, row_grain(heads_of_a_slot * args.tokens * stride),
               KELIX_CPU(linear_attention_backward), args);
  return dqkv;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_glu_backward(const Tensor& grad, const Tensor& x,
                                                          const Tensor& weight, const Tensor& bias,
                                                          int64_t pre_act, int64_t gate_act) {
  Check check("depthwise_glu_backward");
  check.shape(grad, "grad", {"B", "H", "W", "M"})
      .shape(x, "x", {"B", "H", "W", {"2M", 2 * check["M"]}})
      .shape(weight, "weight", {"2M", 3, 3})
      .shape(bias, "bias", {"2M"});
  for (const auto& [tensor, name] : {std::pair(&grad, "grad"), std::pair(&x, "x"),
                                     std::pair(&weight, "weight"), std::pair(&bias, "bias")}) {
    check.dtype(*tensor, name, ScalarType::Float);
  }
  const Tensor upstream = dense(grad);
  const Tensor input = dense(x);
  const Tensor weights = dense(weight);
  const Tensor biases = dense(bias);
  Tensor dx = new_like(input);
  Tensor dweight = new_tensor({check["B"], check["2M"], 3, 3}, ScalarType::Float, input);
  Tensor dbias = new_tensor({check["B"], check["2M"]}, ScalarType::Float, input);
  DepthwiseGluArgs forward{data(input),
                           data(weights),
                           data(biases),
                           nullptr,
                           nullptr,
                           0,
                           check["B"],
                           check["H"],
                           check["W"],
                           check["M"],
                           static_cast<Activation>(pre_act),
                           static_cast<Activation>(gate_act),
                           DType::kFloat32};
  forward.slots = std::min(depthwise_backward_pieces(forward), kMaxWorkers);
  Tensor workspace =
      new_tensor({forward.slots, depthwise_backward_floats(forward.height, forward.width)},
                 ScalarType::Float, input);
  const DepthwiseGluBackwardArgs args{forward,          floats(upstream),
                                      floats_of(dx),    floats_of(dweight),
                                      floats_of(dbias), floats_of(workspace)};
  run_parallel(forward.slots, 1, KELIX_CPU(depthwise_glu_backward), args);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace kelix

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) {
  m.impl("norm_backward", TORCH_BOX(&kelix::norm_backward));
  m.impl("silu_mul_backward", TORCH_BOX(&kelix::silu_mul_backward));
  m.impl("relu_linear_attention_backward", TORCH_BOX(&kelix::relu_linear_attention_backward));
  m.impl("depthwise_glu_backward", TORCH_BOX(&kelix::depthwise_glu_backward));
}
