// skinny_linear and skinny_linear_int8.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include "kernels/linear.h"
#include "ops/launch.h"

namespace kelix {
namespace {

// Of a GPU.
constexpr int64_t kMaxRows = 4 * 65535;  // tiles of four rows in the second dimension of a grid
constexpr int64_t kMaxInt8Outputs = 16 * 65535;  // as many as CTAs there times outputs of one

// `scale` [O] of an int8 weight, or none.
Tensor multiply(const char* op, Check& check, const Tensor& x, const Tensor& weight,
                const std::optional<Tensor>& scale) {
  check.rule(!uses_cuda(x) || check["T"] <= kMaxRows, "x", x,
             "must have at most 262,140 rows; use torch's linear");
  const Tensor input = dense(x), matrix = dense(weight);
  const std::optional<Tensor> factors = dense(scale);
  Tensor y = new_tensor({check["T"], check["O"]}, input.scalar_type(), input);
  SkinnyLinearArgs args{
      data(input),          data(matrix), static_cast<const float*>(data(factors)),
      y.mutable_data_ptr(), nullptr,      check["T"],
      check["I"],           check["O"],   check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA(op, input, skinny_linear, args);
    return y;
  }
  const int64_t wide = args.dtype == DType::kFloat32 ? 0 : args.in + args.out;
  const Tensor workspace = new_tensor({args.rows, wide}, ScalarType::Float, input);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  if (args.rows * args.out > 0) KELIX_CPU(skinny_linear)(args, torch_parallel_for());
  return y;
}

Tensor skinny_linear(const Tensor& x, const Tensor& weight) {
  Check check("skinny_linear");
  check.shape(x, "x", {"T", "I"}).shape(weight, "weight", {"O", "I"});
  check.storage(x, "x").storage(weight, "weight");
  return multiply("skinny_linear", check, x, weight, std::nullopt);
}

Tensor skinny_linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  Check check("skinny_linear_int8");
  check.shape(x, "x", {"T", "I"}).shape(weight, "weight", {"O", "I"}).shape(scale, "scale", {"O"});
  check.storage(x, "x").dtype(weight, "weight", ScalarType::Char);
  check.dtype(scale, "scale", ScalarType::Float);
  check.rule(!uses_cuda(x) || check["O"] <= kMaxInt8Outputs, "weight", weight,
             "must have at most 1,048,560 rows; multiply it in parts");
  return multiply("skinny_linear_int8", check, x, weight, scale);
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_LINEAR(m)                                 \
  m.impl("skinny_linear", TORCH_BOX(&kelix::skinny_linear)); \
  m.impl("skinny_linear_int8", TORCH_BOX(&kelix::skinny_linear_int8))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_LINEAR(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_LINEAR(m); }
