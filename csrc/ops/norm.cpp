// rms_norm, add_rms_norm, layer_norm.
#include "cpu/norm.h"

#include <torch/csrc/stable/library.h>

#include "kernels/norm.h"
#include "ops/launch.h"

namespace kelix {
namespace {

int64_t row_count(const Tensor& x) { return x.size(-1) > 0 ? x.numel() / x.size(-1) : 0; }

Tensor run_rms_norm(const char* op, const Tensor& x, std::optional<Tensor> residual,
                    const Tensor& weight, double eps) {
  const Tensor input = dense(x);
  const Tensor gain = dense(weight);
  Tensor y = new_like(input);
  const RmsNormArgs args{data(input),
                         residual ? residual->mutable_data_ptr() : nullptr,
                         data(gain),
                         y.mutable_data_ptr(),
                         row_count(input),
                         input.size(-1),
                         static_cast<float>(eps),
                         Check(op).storage(input, "x").storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA(op, input, rms_norm, args);
  } else {
    const auto kernel = KELIX_CPU(rms_norm);
    torch_parallel_for()(args.rows, row_grain(args.cols),
                         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return y;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Check("rms_norm")
      .shape(x, "x", {"...", "D"})
      .shape(weight, "weight", {"D"})
      .storage(x, "x")
      .storage(weight, "weight");
  return run_rms_norm("rms_norm", x, std::nullopt, weight, eps);
}

Tensor add_rms_norm(Tensor residual, const Tensor& x, const Tensor& weight, double eps) {
  Check check("add_rms_norm");
  check.shape(residual, "residual", {"...", "D"})
      .shape(x, "x", {"...", "D"})
      .shape(weight, "weight", {"D"})
      .storage(residual, "residual")
      .storage(x, "x")
      .storage(weight, "weight")
      .contiguous(residual, "residual")
      .rule(x.sizes().equals(residual.sizes()), "x", x, "must have the shape of residual ",
            residual);
  return run_rms_norm("add_rms_norm", x, residual, weight, eps);
}

Tensor layer_norm(const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps) {
  Check check("layer_norm");
  check.shape(x, "x", {"...", "D"}).storage(x, "x");
  const bool by_row = (weight && weight->dim() == 2) || (bias && bias->dim() == 2);
  if (by_row) check.shape(x, "x", {"...", "N", "D"});
  for (const auto& [tensor, name] : {std::pair(&weight, "weight"), std::pair(&bias, "bias")}) {
    if (!*tensor) continue;
    by_row ? check.shape(**tensor, name, {"N", "D"}) : check.shape(**tensor, name, {"D"});
    check.storage(**tensor, name);
  }
  const Tensor input = dense(x);
  const auto gain = dense(weight);
  const auto shift = dense(bias);
  Tensor y = new_like(input);
  const LayerNormArgs args{data(input),
                           data(gain),
                           data(shift),
                           y.mutable_data_ptr(),
                           row_count(input),
                           input.size(-1),
                           by_row ? check["N"] : 1,
                           static_cast<float>(eps),
                           check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("layer_norm", input, layer_norm, args);
  } else {
    const auto kernel = KELIX_CPU(layer_norm);
    torch_parallel_for()(args.rows, row_grain(args.cols),
                         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return y;
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_NORM(m)                                 \
  m.impl("rms_norm", TORCH_BOX(&kelix::rms_norm));         \
  m.impl("add_rms_norm", TORCH_BOX(&kelix::add_rms_norm)); \
  m.impl("layer_norm", TORCH_BOX(&kelix::layer_norm))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_NORM(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_NORM(m); }
