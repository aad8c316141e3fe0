#include "cpu/sampling.h"

#include "cpu/row_sampler.h"

namespace kelix::KELIX_ISA {
namespace {

template <class T>
const float* widen_row(const T* row, int64_t cols, float* out) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) out[c] = to_float(row[c]);
  return out;
}
template <>
[[maybe_unused]] const float* widen_row<float>(const float* row, int64_t, float*) {
  return row;
}

template <class T>
void sample_rows(const SampleArgs& args, float* workspace, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* params = args.params + 4 * r;
    const DrawRule rule{params[0],     params[1],     params[2],     params[3],     args.seeds[r],
                        args.steps[r], args.slots[r], args.first_id, args.reference};
    const T* logits = static_cast<const T*>(args.logits) + r * args.cols;
    const float* row = widen_row(logits, args.cols, workspace);
    const Drawn drawn = draw_row(row, args.cols, rule, workspace);
    args.ids[r] = drawn.id;
    args.logprobs[r] = drawn.logprob;
  }
}

}  // namespace

void sample_blocks(const SampleArgs& args, float* workspace, int64_t begin, int64_t end) {
  with_dtype(args.dtype,
             [&](auto type) { sample_rows<decltype(type)>(args, workspace, begin, end); });
}

}  // namespace kelix::KELIX_ISA
