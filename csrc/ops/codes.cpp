// nearest_codes, block_embed.
#include "cpu/codes.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/ceil_div.h"
#include "kernels/codes.h"
#include "ops/launch.h"

namespace kelix {
namespace {

constexpr int64_t kWorkspaceFloats = int64_t{2} << 20;  // 8 MB over all workers

// Workers that share the (book, block of tokens) pieces, each with its own scratch.
int64_t worker_count(const NearestCodesArgs& args) {
  const int64_t pieces = args.books * ceil_div(args.tokens, kCodeTokens);
  const int64_t slot_floats = std::max<int64_t>(1, nearest_codes_slot_floats(args.dim));
  return std::min(pieces, std::max<int64_t>(1, kWorkspaceFloats / slot_floats));
}

// What both operators want of the books and their tokens.
void check_books(Check& check, const Tensor& z, const Tensor& codebooks, const Tensor& norms) {
  check.shape(z, "z", {"T", "N", "d"})
      .shape(codebooks, "codebooks", {"N", "K", "d"})
      .shape(norms, "norms", {"N", "K"})
      .storage(z, "z")
      .storage(codebooks, "codebooks")
      .dtype(norms, "norms", ScalarType::Float)
      .rule(check["K"] > 0 && check["K"] <= INT32_MAX, "codebooks", codebooks,
            "must have 1 to 2^31 - 1 codes per book");
}

Tensor nearest_codes(const Tensor& z, const Tensor& codebooks, const Tensor& norms,
                     const std::optional<Tensor>& ln_weight, const std::optional<Tensor>& ln_bias,
                     double eps, bool reference) {
  Check check("nearest_codes");
  check_books(check, z, codebooks, norms);
  check.rule(ln_weight.has_value() == ln_bias.has_value(), "ln_weight and ln_bias",
             ln_weight ? "ln_weight only" : "ln_bias only", "must both be given or both be None");
  if (ln_weight) check.shape(*ln_weight, "ln_weight", {"N", "d"}).storage(*ln_weight, "ln_weight");
  if (ln_bias) check.shape(*ln_bias, "ln_bias", {"N", "d"}).storage(*ln_bias, "ln_bias");
  const Tensor input = dense(z);
  const Tensor books = dense(codebooks);
  const Tensor squares = dense(norms);
  const auto gain = dense(ln_weight);
  const auto shift = dense(ln_bias);
  Tensor indices = new_tensor({check["T"], check["N"]}, ScalarType::Long, input);
  NearestCodesArgs args{data(input),
                        data(books),
                        static_cast<const float*>(data(squares)),
                        data(gain),
                        data(shift),
                        nullptr,
                        static_cast<int64_t*>(indices.mutable_data_ptr()),
                        nullptr,
                        0,
                        check["T"],
                        check["N"],
                        check["K"],
                        check["d"],
                        static_cast<float>(eps),
                        reference,
                        check.storage_type()};
  if (uses_cuda(input)) {
    KELIX_LAUNCH_CUDA("nearest_codes", input, nearest_codes, args);
    return indices;
  }
  args.slots = worker_count(args);
  const Tensor workspace =
      new_tensor({args.slots, nearest_codes_slot_floats(args.dim)}, ScalarType::Float, input);
  args.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  const auto kernel = KELIX_CPU(nearest_codes);
  torch_parallel_for()(args.slots, 1,
                       [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return indices;
}

// Contiguous from a multiple of 16 bytes on, as TMA wants it.
Tensor aligned(const Tensor& tensor) {
  const Tensor packed = dense(tensor);
  if (reinterpret_cast<uintptr_t>(data(packed)) % 16 == 0) return packed;
  Tensor copy = new_like(packed);
  torch::stable::copy_(copy, packed);
  return copy;
}

Tensor nearest_codes_cutlass(const Tensor& z, const Tensor& codebooks, const Tensor& norms,
                             const std::optional<Tensor>& token_norms) {
  Check check("nearest_codes_cutlass");
  check_books(check, z, codebooks, norms);
  if (token_norms) {
    check.shape(*token_norms, "token_norms", {"T", "N"})
        .dtype(*token_norms, "token_norms", ScalarType::Float);
  }
  check
      .rule(check.storage_type() != DType::kFloat32, "z", z.scalar_type(),
            "must be bfloat16 or float16")
      .rule(check["d"] > 0 && check["d"] % 8 == 0, "z", z, "must have a d that is a multiple of 8")
      .rule(check["T"] <= INT32_MAX, "z", z, "must have fewer than 2^31 tokens")
      .rule(uses_cuda(z), "z", "a CPU tensor", "must be on a GPU (nearest_codes runs everywhere)");
  const Tensor input = aligned(z);
  const Tensor books = aligned(codebooks);
  const Tensor squares = dense(norms);
  const auto rounded = dense(token_norms);
  Tensor indices = new_tensor({check["T"], check["N"]}, ScalarType::Long, input);
  NearestCodesArgs args{};
  args.z = data(input);
  args.codebooks = data(books);
  args.norms = static_cast<const float*>(data(squares));
  args.token_norms = static_cast<const float*>(data(rounded));
  args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  args.tokens = check["T"];
  args.books = check["N"];
  args.codes = check["K"];
  args.dim = check["d"];
  args.reference = token_norms.has_value();
  args.dtype = check.storage_type();
  KELIX_LAUNCH_CUDA("nearest_codes_cutlass", input, nearest_codes_cutlass, args);
  return indices;
}

// Every id that is summed must be a row of the table. On a GPU this would cost a synchronisation:
// there the kernel writes NaN instead.
void check_ids(Check& check, const BlockEmbedArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t* ids = args.ids + row * args.slots;
    const int64_t last = ids[0] < args.text_vocab ? 1 : args.slots - 1;
    for (int64_t slot = 0; slot < std::min(last, args.slots - 1); ++slot) {
      if (ids[slot] == args.block_end) break;
      if (ids[slot] < 0 || ids[slot] >= args.vocab) {
        check.rule(false, "ids", std::to_string(ids[slot]) + " in row " + std::to_string(row),
                   "must be rows of table, 0 <= id < VT=", args.vocab);
      }
    }
  }
}

Tensor block_embed(const Tensor& ids, const Tensor& table, int64_t text_vocab, int64_t block_end) {
  Check check("block_embed");
  check.shape(ids, "ids", {"P", "N+1"})
      .shape(table, "table", {"VT", "D"})
      .dtype(ids, "ids", ScalarType::Long)
      .storage(table, "table")
      .rule(check["N+1"] > 0, "ids", ids, "must have at least one column");
  const Tensor rows = dense(ids);
  const Tensor embeddings = dense(table);
  Tensor y = new_tensor({check["P"], check["D"]}, table.scalar_type(), embeddings);
  const BlockEmbedArgs args{static_cast<const int64_t*>(data(rows)),
                            data(embeddings),
                            y.mutable_data_ptr(),
                            check["P"],
                            check["N+1"],
                            check["D"],
                            check["VT"],
                            text_vocab,
                            block_end,
                            check.storage_type()};
  if (uses_cuda(rows)) {
    KELIX_LAUNCH_CUDA("block_embed", rows, block_embed, args);
  } else {
    check_ids(check, args);
    const auto kernel = KELIX_CPU(block_embed);
    const int64_t grain =
        std::max<int64_t>(1, 16384 / std::max<int64_t>(1, args.cols * args.slots));
    torch_parallel_for()(args.rows, grain,
                         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
  return y;
}

}  // namespace
}  // namespace kelix

#define KELIX_IMPL_CODES(m)                                                  \
  m.impl("nearest_codes", TORCH_BOX(&kelix::nearest_codes));                 \
  m.impl("nearest_codes_cutlass", TORCH_BOX(&kelix::nearest_codes_cutlass)); \
  m.impl("block_embed", TORCH_BOX(&kelix::block_embed))

STABLE_TORCH_LIBRARY_IMPL(kelix, CPU, m) { KELIX_IMPL_CODES(m); }
STABLE_TORCH_LIBRARY_IMPL(kelix, CUDA, m) { KELIX_IMPL_CODES(m); }
