// The schemas of all operators, declared once. Shapes and meaning: kelix_rt/ops/<stem>.py.
#include <torch/csrc/stable/library.h>

#ifdef KELIX_CUTLASS
#include <cutlass/version.h>
#endif

#include <string>

#include "common/isa.h"
#include "ops/launch.h"

namespace kelix {
namespace {

// What this library is: "isa=avx512 cuda=80-real,90a-real cutlass=4.2.0", or "isa=avx2 cuda=" when
// it was built without nvcc. (cutlass: the headers the CUDA build found, if any.)
std::string build_info() {
  std::string text = "isa=";
  switch (current_isa()) {
    case Isa::kBaseline:
      text += "baseline";
      break;
    case Isa::kAvx2:
      text += "avx2";
      break;
    case Isa::kAvx512:
      text += "avx512";
      break;
  }
#ifdef KELIX_CUDA
  text += " cuda=" KELIX_CUDA_ARCHS;
#else
  text += " cuda=";
#endif
#ifdef KELIX_CUTLASS
  text += " cutlass=" + std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." +
          std::to_string(CUTLASS_PATCH);
#endif
  return text;
}

}  // namespace
}  // namespace kelix

STABLE_TORCH_LIBRARY(kelix, m) {
  m.def("build_info() -> str");

  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-06) -> Tensor");
  m.def("add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps=1e-06) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps=1e-05) -> Tensor");

  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("skinny_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("skinny_linear_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");

  m.def(
      "rope_store_kv(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos_sin, "
      "Tensor positions, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, int num_heads, "
      "float eps=1e-06) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, "
      "Tensor context_lens, Tensor query_start, float scale) -> Tensor");

  m.def(
      "nearest_codes(Tensor z, Tensor codebooks, Tensor norms, Tensor? ln_weight, "
      "Tensor? ln_bias, float eps=1e-05, bool reference=False) -> Tensor");
  m.def(
      "nearest_codes_cutlass(Tensor z, Tensor codebooks, Tensor norms, Tensor? token_norms) "
      "-> Tensor");
  m.def("block_embed(Tensor ids, Tensor table, int text_vocab, int block_end) -> Tensor");

  m.def(
      "sample_blocks(Tensor logits, Tensor params, Tensor seeds, Tensor steps, Tensor slots, "
      "int first_id=0, bool reference=False) -> (Tensor ids, Tensor logprobs)");
  m.def(
      "block_decode(Tensor hidden, Tensor weights, Tensor table, Tensor head_norm, Tensor head, "
      "Tensor params, Tensor seeds, Tensor steps, int num_codes, int text_vocab, int block_end, "
      "int banned_id, int d_model, int num_heads, int num_layers, int ffn, "
      "float norm_eps=1e-06, Tensor? head_scale=None) -> (Tensor ids, Tensor logprobs)");

  m.def("modulate(Tensor x, Tensor shift, Tensor scale, float eps=1e-06) -> Tensor");
  m.def("gated_residual(Tensor(a!) x, Tensor gate, Tensor y) -> ()");
  m.def(
      "relu_linear_attention(Tensor qkv, Tensor? q_norm, Tensor? k_norm, int head_dim, "
      "float norm_eps=1e-05, float eps=1e-08) -> Tensor");
  m.def(
      "depthwise_glu(Tensor x, Tensor weight, Tensor bias, int pre_act=1, int gate_act=1) "
      "-> Tensor");
  m.def(
      "euler_step(Tensor(a!) latent, Tensor velocity, Tensor? uncond, Tensor dt, "
      "Tensor? guidance) -> ()");

  m.def(
      "norm_backward(Tensor grad, Tensor x, Tensor? gain, int group, bool centred, float eps) "
      "-> (Tensor dx, Tensor sums)");
  m.def("silu_mul_backward(Tensor grad, Tensor x) -> Tensor");
  m.def(
      "relu_linear_attention_backward(Tensor grad, Tensor qkv, int head_dim, float eps) -> Tensor");
  m.def(
      "depthwise_glu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, int pre_act, "
      "int gate_act) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(kelix, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&kelix::build_info));
}
