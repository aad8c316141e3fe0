// skinny_linear.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include "kernels/linear.h"
#include "ops/launch.h"

namespace kelix {
namespace {

constexpr int64_t kMaxRows = 4 * 65535;  // tiles of four rows in the second dimension of a grid

Tensor skinny_linear(const Tensor& x, const Tensor& weight) {
  Check check("skinny_linear");
  check.shape(x, "x", {"T", "I"}).shape(weight, "weight", {"O", "I"});
  check.storage(x, "x").storage(weight, "weight");
  check.rule(check["T"] <= kMaxRows, "x", "must have at most 262,140 rows; use torch's linear",
             shape_text(x));
  const Tensor input = dense(x);
  const Tensor matrix = dense(weight);
  Tensor y = new_tensor({check["T"], check["O"]}, input.scalar_type(), input);
  SkinnyLinearArgs args{data(input), data(matrix), y.mutable_data_ptr(), nullptr,
                        check["T"],  check["I"],   check["O"],           check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("skinny_linear", input, skinny_linear, args);
    return y;
  }
  const int64_t wide = args.dtype == DType::kFloat32 ? 0 : args.in + args.out;
  const Tensor workspace = new_tensor({args.rows, wide}, ScalarType::Float, input);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  if (args.rows * args.out > 0) KELIX_CPU(skinny_linear)(args, torch_parallel_for());
  return y;
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_LINEAR(m) m.impl("skinny_linear", TORCH_BOX(&kelix::skinny_linear))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_LINEAR(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_LINEAR(m); }
