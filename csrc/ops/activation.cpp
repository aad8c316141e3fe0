// silu_mul.
#include "cpu/activation.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "kernels/activation.h"
#include "ops/launch.h"

namespace kelix {
namespace {

Tensor silu_mul(const Tensor& x) {
  Check check("silu_mul");
  check.shape(x, "x", {"...", "2F"}).storage(x, "x");
  const int64_t width = check["2F"];
  check.rule(width % 2 == 0, "x", x, "must have an even last dimension (gate | up)");
  const Tensor input = dense(x);
  std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = width / 2;
  Tensor y = new_tensor(sizes, input.scalar_type(), input);
  const SiluMulArgs args{data(input), y.mutable_data_ptr(), width > 0 ? input.numel() / width : 0,
                         width / 2, check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("silu_mul", input, silu_mul, args);
  } else {
    const auto kernel = KELIX_CPU(silu_mul);
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, args.cols));
    torch_parallel_for()(args.rows, grain,
                         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return y;
}

}  // namespace
}  // namespace kelix

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { m.impl("silu_mul", TORCH_BOX(&kelix::silu_mul)); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { m.impl("silu_mul", TORCH_BOX(&kelix::silu_mul)); }
