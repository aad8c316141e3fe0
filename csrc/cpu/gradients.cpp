// Gradients of norms, of silu_mul and of attention with ReLU features.
#include "cpu/gradients.h"

#include <cmath>

#include "cpu/register_tile.h"
#include "cpu/row_stats.h"
#include "cpu/simd.h"

namespace kelix::KELIX_ISA {
namespace {

RowStats stats_of(const NormBackwardArgs& args, const float* x) {
  if (args.centred) return row_stats(x, args.cols, args.eps);
  return {0.0f, 0.0f, 1.0f / std::sqrt(mean_square(x, args.cols) + args.eps)};
}

// With h = grad * gain and n = normed(x): dx = (h - mean(h) - n mean(h n)) * scale, the first mean
// only where x is centred.
void norm_backward_row(const NormBackwardArgs& args, int64_t row, const float* gain, float* sums) {
  const int64_t cols = args.cols;
  const float* x = args.x + row * cols;
  const float* grad = args.grad + row * cols;
  float* dx = args.dx + row * cols;
  const RowStats stats = stats_of(args, x);
  float sum = 0;
  float along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (int64_t c = 0; c < cols; ++c) {
    const float normed = stats.normed(x[c]);
    const float h = gain != nullptr ? grad[c] * gain[c] : grad[c];
    sum += h;
    along += h * normed;
    sums[c] += grad[c] * normed;
    sums[cols + c] += grad[c];
  }
  const float inv_cols = 1.0f / static_cast<float>(cols);
  const float mean = args.centred ? sum * inv_cols : 0.0f;
  along *= inv_cols;
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) {
    const float h = gain != nullptr ? grad[c] * gain[c] : grad[c];
    dx[c] = (h - mean - stats.normed(x[c]) * along) * stats.scale;
  }
}

// A head of q, k or v, or of the gradient, as [tokens, stride] with zeros past head_dim.
void load_head(const float* source, int64_t row_floats, int64_t tokens, int64_t head_dim,
               int64_t stride, bool rectified, float* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* x = source + t * row_floats;
    float* row = out + t * stride;
#pragma omp simd
    for (int64_t c = 0; c < head_dim; ++c) row[c] = rectified && x[c] < 0.0f ? 0.0f : x[c];
    for (int64_t c = head_dim; c < stride; ++c) row[c] = 0;
  }
}

constexpr int kVectors = 2;
static_assert(kStatePad % (kVectors * kLanes) == 0 && kStatePad % kTileRows == 0);

// out = a s of [tokens, stride] and [stride, stride]; `out` has room for whole tiles of rows.
void row_product(const float* a, const float* s, int64_t tokens, int64_t stride, float* out) {
  for (int64_t t = 0; t < tokens; t += kTileRows) {
    const float* rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r)
      rows[r] = a + (t + r < tokens ? t + r : tokens - 1) * stride;
    for (int64_t j = 0; j < stride; j += kVectors * kLanes) {
      register_tile<kVectors, false>(rows, 1, s + j, stride, stride, out + t * stride + j, stride);
    }
  }
}

float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// With d_n = q_n . z + eps and u_n = grad_n / d_n, where out_n = q_n S / d_n:
//   dq_n = S u_n - e_n z,  e_n = (q_n . S u_n) / d_n
//   dk_n = dS v_n - sum_m e_m q_m,  dS = q^T u;  dv_n = k_n dS
// Gradients of q and k are zero where ReLU is. q: the workspace, which begins with q.
void attention_backward_head(const LinearAttentionBackwardArgs& args, int64_t index, float* q) {
  const int64_t tokens = args.tokens, stride = args.stride, dim = args.head_dim;
  const int64_t cols = args.heads * dim;
  const int64_t batch = index / args.heads, head = index % args.heads;
  const float* qkv = args.qkv + batch * tokens * 3 * cols + head * dim;
  const float* grad = args.grad + batch * tokens * cols + head * dim;
  float* dqkv = args.dqkv + batch * tokens * 3 * cols + head * dim;
  const int64_t rows = (tokens + kAttentionTokens - 1) / kAttentionTokens * kAttentionTokens;
  float* k = q + rows * stride;
  float* v = k + rows * stride;
  float* u = v + rows * stride;
  float* result = u + rows * stride;
  float* turned_state = result + rows * stride;  // S^T
  float* dstate = turned_state + stride * stride;
  float* turned_dstate = dstate + stride * stride;
  float* key_sum = turned_dstate + stride * stride;
  float* dkey_sum = key_sum + stride;
  load_head(qkv, 3 * cols, tokens, dim, stride, true, q);
  load_head(qkv + cols, 3 * cols, tokens, dim, stride, true, k);
  load_head(qkv + 2 * cols, 3 * cols, tokens, dim, stride, false, v);
  load_head(grad, cols, tokens, dim, stride, false, u);
  transposed_product<false>(v, k, tokens, stride, turned_state);
  for (int64_t c = 0; c < stride; ++c) key_sum[c] = dkey_sum[c] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
#pragma omp simd
    for (int64_t c = 0; c < stride; ++c) key_sum[c] += k[t * stride + c];
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const float inverse = 1.0f / (dot(q + t * stride, key_sum, stride) + args.eps);
#pragma omp simd
    for (int64_t c = 0; c < stride; ++c) u[t * stride + c] *= inverse;
  }
  row_product(u, turned_state, tokens, stride, result);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* own = q + t * stride;
    const float* along = result + t * stride;
    const float error = dot(own, along, stride) / (dot(own, key_sum, stride) + args.eps);
    float* dq = dqkv + t * 3 * cols;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      dq[c] = own[c] > 0.0f ? along[c] - error * key_sum[c] : 0.0f;
    }
#pragma omp simd
    for (int64_t c = 0; c < stride; ++c) dkey_sum[c] -= error * own[c];
  }
  transposed_product<false>(q, u, tokens, stride, dstate);
  transposed_product<false>(u, q, tokens, stride, turned_dstate);
  row_product(v, turned_dstate, tokens, stride, result);
  for (int64_t t = 0; t < tokens; ++t) {
    float* dk = dqkv + t * 3 * cols + cols;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      dk[c] = k[t * stride + c] > 0.0f ? result[t * stride + c] + dkey_sum[c] : 0.0f;
    }
  }
  row_product(k, dstate, tokens, stride, result);
  for (int64_t t = 0; t < tokens; ++t) {
    float* dv = dqkv + t * 3 * cols + 2 * cols;
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) dv[c] = result[t * stride + c];
  }
}

}  // namespace

void norm_backward(const NormBackwardArgs& args, int64_t begin, int64_t end) {
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t group = piece / args.pieces;
    const int64_t first = piece % args.pieces * kGradientRows;
    const int64_t left = args.group - first;
    const int64_t count = left < kGradientRows ? left : kGradientRows;
    const float* gain = args.gain != nullptr ? args.gain + group * args.cols : nullptr;
    float* sums = args.sums + piece * 2 * args.cols;
    for (int64_t c = 0; c < 2 * args.cols; ++c) sums[c] = 0;
    for (int64_t row = 0; row < count; ++row) {
      norm_backward_row(args, group * args.group + first + row, gain, sums);
    }
  }
}

void silu_mul_backward(const SiluMulBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t cols = args.cols;
  for (int64_t row = begin; row < end; ++row) {
    const float* gate = args.x + row * 2 * cols;
    const float* grad = args.grad + row * cols;
    float* dx = args.dx + row * 2 * cols;
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const float sigmoid = 1.0f / (1.0f + exp_simd(-gate[c]));
      const float silu = gate[c] * sigmoid;
      dx[c] = grad[c] * gate[cols + c] * (sigmoid + silu * (1.0f - sigmoid));
      dx[cols + c] = grad[c] * silu;
    }
  }
}

void linear_attention_backward(const LinearAttentionBackwardArgs& args, int64_t begin,
                               int64_t end) {
  // One workspace for the whole range: memory that nobody touches costs nothing.
  float* workspace =
      args.workspace + begin * linear_attention_backward_floats(args.tokens, args.stride);
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int64_t index = slot; index < args.batch * args.heads; index += args.slots) {
      attention_backward_head(args, index, workspace);
    }
  }
}

}  // namespace kelix::KELIX_ISA
