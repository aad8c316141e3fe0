// sample_blocks.
#include "cpu/sampling.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <tuple>

#include "kernels/sampling.h"
#include "ops/launch.h"

namespace kelix {
namespace {

std::tuple<Tensor, Tensor> sample_blocks(const Tensor& logits, const Tensor& params,
                                         const Tensor& seeds, const Tensor& steps,
                                         const Tensor& slots, int64_t first_id, bool reference) {
  Check check("sample_blocks");
  check.shape(logits, "logits", {"R", "W"})
      .storage(logits, "logits")
      .shape(params, "params", {"R", 4})
      .dtype(params, "params", ScalarType::Float)
      .shape(seeds, "seeds", {"R"})
      .dtype(seeds, "seeds", ScalarType::Long)
      .shape(steps, "steps", {"R"})
      .dtype(steps, "steps", ScalarType::Long)
      .shape(slots, "slots", {"R"})
      .dtype(slots, "slots", ScalarType::Long);
  const int64_t rows = check["R"], cols = check["W"];
  check.rule(cols > 0 || rows == 0, "logits", logits, "must have at least one column")
      .rule(first_id >= 0 && first_id <= std::numeric_limits<int32_t>::max() - cols, "first_id",
            first_id, "must be >= 0, and first_id + W < 2^31");
  const Tensor input = dense(logits), rules = dense(params), seed = dense(seeds);
  const Tensor step = dense(steps), slot = dense(slots);
  Tensor ids = new_tensor({rows}, ScalarType::Long, input);
  Tensor logprobs = new_tensor({rows}, ScalarType::Float, input);
  SampleArgs args{data(input),
                  static_cast<const float*>(data(rules)),
                  static_cast<const int64_t*>(data(seed)),
                  static_cast<const int64_t*>(data(step)),
                  static_cast<const int64_t*>(data(slot)),
                  static_cast<int64_t*>(ids.mutable_data_ptr()),
                  static_cast<float*>(logprobs.mutable_data_ptr()),
                  nullptr,
                  rows,
                  cols,
                  first_id,
                  reference,
                  check.storage_type()};
  if (uses_cuda(input)) {
    Tensor workspace = new_tensor({rows, draw_workspace(cols)}, ScalarType::Float, input);
    args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    KELIX_LAUNCH_CUDA("sample_blocks", input, sample_blocks, args);
  } else {
    const auto kernel = KELIX_CPU(sample_blocks);
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, cols));
    torch_parallel_for()(rows, grain, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> workspace(new float[draw_workspace(cols)]);
      kernel(args, workspace.get(), begin, end);
    });
  }
  return {ids, logprobs};
}

}  // namespace
}  // namespace kelix

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) {
  m.impl("sample_blocks", TORCH_BOX(&kelix::sample_blocks));
}
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) {
  m.impl("sample_blocks", TORCH_BOX(&kelix::sample_blocks));
}
