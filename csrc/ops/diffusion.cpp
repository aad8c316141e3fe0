// modulate, gated_residual, relu_linear_attention, depthwise_glu, euler_step.
#include "cpu/diffusion.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/ceil_div.h"
#include "kernels/diffusion.h"
#include "ops/launch.h"

namespace kelix {
namespace {

Tensor modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  Check check("modulate");
  check.shape(x, "x", {"B", "N", "C"})
      .shape(shift, "shift", {"B", "C"})
      .shape(scale, "scale", {"B", "C"})
      .storage(x, "x")
      .storage(shift, "shift")
      .storage(scale, "scale");
  const Tensor input = dense(x);
  const Tensor shifts = dense(shift);
  const Tensor scales = dense(scale);
  Tensor y = new_like(input);
  const ModulateArgs args{data(input),         data(shifts), data(scales), y.mutable_data_ptr(),
                          check["B"],          check["N"],   check["C"],   static_cast<float>(eps),
                          check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("modulate", input, modulate, args);
  } else {
    run_parallel(args.batch * args.tokens, row_grain(args.cols), KELIX_CPU(modulate), args);
  }
  return y;
}

void gated_residual(Tensor x, const Tensor& gate, const Tensor& y) {
  Check check("gated_residual");
  check.shape(x, "x", {"B", "N", "C"})
      .shape(gate, "gate", {"B", "C"})
      .shape(y, "y", {"B", "N", "C"})
      .storage(x, "x")
      .storage(gate, "gate")
      .storage(y, "y")
      .contiguous(x, "x");
  const Tensor gates = dense(gate);
  const Tensor addend = dense(y);
  const GatedResidualArgs args{x.mutable_data_ptr(), data(gates), data(addend),        check["B"],
                               check["N"],           check["C"],  check.storage_type()};
  if (uses_cuda(x)) {
    KELIX_LAUNCH_CUDA("gated_residual", x, gated_residual, args);
  } else {
    run_parallel(args.batch * args.tokens, row_grain(args.cols), KELIX_CPU(gated_residual), args);
  }
}

void attend_on_cpu(const LinearAttentionArgs& args) {
  const int64_t cols = args.heads * args.head_dim;
  const int64_t tiles = ceil_div(args.tokens, kAttentionTokens);
  const int64_t head_work = std::max<int64_t>(1, args.tokens * args.head_dim);
  if (args.scales != nullptr) {
    run_parallel(args.batch * args.tokens, row_grain(2 * cols), KELIX_CPU(linear_attention_scales),
                 args);
  }
  run_parallel(args.batch * args.heads, row_grain(head_work), KELIX_CPU(linear_attention_state),
               args);
  run_parallel(args.batch * tiles, row_grain(kAttentionTokens * cols),
               KELIX_CPU(linear_attention_output), args);
}

Tensor relu_linear_attention(const Tensor& qkv, const std::optional<Tensor>& q_norm,
                             const std::optional<Tensor>& k_norm, int64_t head_dim, double norm_eps,
                             double eps) {
  Check check("relu_linear_attention");
  check.shape(qkv, "qkv", {"B", "N", "3C"}).storage(qkv, "qkv");
  check.rule(check["3C"] % 3 == 0, "qkv", qkv, "must hold q, k and v in its last dimension");
  const int64_t cols = check["3C"] / 3;
  check.rule(head_dim > 0 && cols % head_dim == 0, "head_dim", head_dim, "must divide C=", cols)
      .rule(head_dim <= kMaxLinearHeadDim, "head_dim", head_dim, "must be at most ",
            kMaxLinearHeadDim)
      .rule(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm",
            q_norm ? "q_norm only" : "k_norm only", "must both be given or both be None");
  if (q_norm) {
    check.shape(*q_norm, "q_norm", {{"C", cols}})
        .shape(*k_norm, "k_norm", {{"C", cols}})
        .storage(*q_norm, "q_norm")
        .storage(*k_norm, "k_norm");
  }
  const Tensor input = dense(qkv);
  const auto q_weight = dense(q_norm);
  const auto k_weight = dense(k_norm);
  const int64_t batch = check["B"];
  const int64_t tokens = check["N"];
  const int64_t heads = cols / head_dim;
  const int64_t stride = ceil_div(head_dim, kStatePad) * kStatePad;
  Tensor y = new_tensor({batch, tokens, cols}, input.scalar_type(), input);
  const int64_t pieces = uses_cuda(input) ? ceil_div(tokens, kStateTokens) : 1;
  Tensor states =
      new_tensor({batch * heads, pieces, stride * (stride + 1)}, ScalarType::Float, input);
  std::optional<Tensor> scales;
  if (q_norm) scales = new_tensor({batch * tokens, 2}, ScalarType::Float, input);
  const LinearAttentionArgs args{data(input),
                                 data(q_weight),
                                 data(k_weight),
                                 y.mutable_data_ptr(),
                                 scales ? static_cast<float*>(scales->mutable_data_ptr()) : nullptr,
                                 static_cast<float*>(states.mutable_data_ptr()),
                                 batch,
                                 tokens,
                                 heads,
                                 head_dim,
                                 stride,
                                 stride * (stride + 1),
                                 pieces,
                                 static_cast<float>(norm_eps),
                                 static_cast<float>(eps),
                                 check.storage_type()};
  if (y.numel() == 0) return y;
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("relu_linear_attention", input, relu_linear_attention, args);
  } else {
    attend_on_cpu(args);
  }
  return y;
}

Activation activation(Check& check, const char* name, int64_t code) {
  check.rule(code >= 0 && code <= 2, name, code, "must be 0 (none), 1 (SiLU) or 2 (GELU)");
  return static_cast<Activation>(code);
}

Tensor depthwise_glu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t pre_act,
                     int64_t gate_act) {
  Check check("depthwise_glu");
  check.shape(x, "x", {"B", "H", "W", "2M"})
      .shape(weight, "weight", {"2M", 3, 3})
      .shape(bias, "bias", {"2M"})
      .storage(x, "x")
      .storage(weight, "weight")
      .storage(bias, "bias")
      .rule(check["2M"] % 2 == 0, "x", x, "must have an even last dimension (value | gate)");
  const Tensor input = dense(x);
  const Tensor weights = dense(weight);
  const Tensor biases = dense(bias);
  const int64_t channels = check["2M"] / 2;
  Tensor y = new_tensor({check["B"], check["H"], check["W"], channels}, input.scalar_type(), input);
  DepthwiseGluArgs args{data(input),
                        data(weights),
                        data(biases),
                        y.mutable_data_ptr(),
                        nullptr,
                        0,
                        check["B"],
                        check["H"],
                        check["W"],
                        channels,
                        activation(check, "pre_act", pre_act),
                        activation(check, "gate_act", gate_act),
                        check.storage_type()};
  if (y.numel() == 0) return y;
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("depthwise_glu", input, depthwise_glu, args);
    return y;
  }
  constexpr int64_t kMaxWorkers = 64;
  args.slots = std::min(depthwise_pieces(args), kMaxWorkers);
  const Tensor workspace =
      new_tensor({args.slots, depthwise_slot_floats(args.width)}, ScalarType::Float, input);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  run_parallel(args.slots, 1, KELIX_CPU(depthwise_glu), args);
  return y;
}

void euler_step(Tensor latent, const Tensor& velocity, const std::optional<Tensor>& uncond,
                const Tensor& dt, const std::optional<Tensor>& guidance) {
  Check check("euler_step");
  check.rule(latent.dim() > 0, "latent", latent, "must have a batch dimension")
      .device(latent, "latent")
      .dtype(latent, "latent", ScalarType::Float)
      .contiguous(latent, "latent")
      .rule(velocity.sizes().equals(latent.sizes()), "velocity", velocity,
            "must have the shape of latent ", latent)
      .device(velocity, "velocity")
      .storage(velocity, "velocity")
      .shape(dt, "dt", {{"B", latent.size(0)}})
      .dtype(dt, "dt", ScalarType::Float)
      .rule(uncond.has_value() == guidance.has_value(), "uncond and guidance",
            uncond ? "uncond only" : "guidance only", "must both be given or both be None");
  if (uncond) {
    check
        .rule(uncond->sizes().equals(latent.sizes()), "uncond", *uncond,
              "must have the shape of latent ", latent)
        .device(*uncond, "uncond")
        .storage(*uncond, "uncond")
        .shape(*guidance, "guidance", {{"B", latent.size(0)}})
        .dtype(*guidance, "guidance", ScalarType::Float);
  }
  if (latent.numel() == 0) return;
  const Tensor step = dense(velocity);
  const auto base = dense(uncond);
  const Tensor sizes = dense(dt);
  const auto strength = dense(guidance);
  const EulerStepArgs args{static_cast<float*>(latent.mutable_data_ptr()),
                           data(step),
                           data(base),
                           static_cast<const float*>(data(sizes)),
                           static_cast<const float*>(data(strength)),
                           latent.size(0),
                           latent.numel() / latent.size(0),
                           check.storage_type()};
  if (uses_cuda(latent)) {
    KELIX_LAUNCH_CUDA("euler_step", latent, euler_step, args);
  } else {
    run_parallel(latent.numel(), 65536, KELIX_CPU(euler_step), args);
  }
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_DIFFUSION(m)                                              \
  m.impl("modulate", TORCH_BOX(&kelix::modulate));                           \
  m.impl("gated_residual", TORCH_BOX(&kelix::gated_residual));               \
  m.impl("relu_linear_attention", TORCH_BOX(&kelix::relu_linear_attention)); \
  m.impl("depthwise_glu", TORCH_BOX(&kelix::depthwise_glu));                 \
  m.impl("euler_step", TORCH_BOX(&kelix::euler_step))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_DIFFUSION(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_DIFFUSION(m); }
