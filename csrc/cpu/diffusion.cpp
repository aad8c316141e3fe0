// The elementwise operators of the diffusion stem, and attention with ReLU features.
#include "cpu/diffusion.h"

#include <cmath>

#include "cpu/register_tile.h"
#include "cpu/row_stats.h"
#include "cpu/simd.h"

namespace kelix::KELIX_ISA {
namespace {

template <class T>
void modulate_rows(const ModulateArgs& args, int64_t begin, int64_t end) {
  const int64_t cols = args.cols;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * cols;
    const T* shift = static_cast<const T*>(args.shift) + row / args.tokens * cols;
    const T* scale = static_cast<const T*>(args.scale) + row / args.tokens * cols;
    T* y = static_cast<T*>(args.y) + row * cols;
    const RowStats stats = row_stats(x, cols, args.eps);
#pragma omp simd
    for (int64_t c = 0; c < cols; ++c) {
      const float normed = stats.normed(to_float(x[c]));
      y[c] = from_float<T>(normed * (1.0f + to_float(scale[c])) + to_float(shift[c]));
    }
  }
}

template <class T>
void gated_residual_rows(const GatedResidualArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(args.x) + row * args.cols;
    const T* y = static_cast<const T*>(args.y) + row * args.cols;
    const T* gate = static_cast<const T*>(args.gate) + row / args.tokens * args.cols;
#pragma omp simd
    for (int64_t c = 0; c < args.cols; ++c) {
      x[c] = from_float<T>(to_float(x[c]) + to_float(gate[c]) * to_float(y[c]));
    }
  }
}

template <class T>
void euler_step_range(const EulerStepArgs& args, int64_t begin, int64_t end) {
  const T* velocity = static_cast<const T*>(args.velocity);
  const T* uncond = static_cast<const T*>(args.uncond);
  while (begin < end) {
    const int64_t row = begin / args.cols;
    const int64_t row_end = (row + 1) * args.cols;
    const int64_t stop = row_end < end ? row_end : end;
    const float dt = args.dt[row];
    if (uncond == nullptr) {
#pragma omp simd
      for (int64_t i = begin; i < stop; ++i) args.latent[i] += dt * to_float(velocity[i]);
    } else {
      const float guidance = args.guidance[row];
#pragma omp simd
      for (int64_t i = begin; i < stop; ++i) {
        const float base = to_float(uncond[i]);
        args.latent[i] += dt * (base + guidance * (to_float(velocity[i]) - base));
      }
    }
    begin = stop;
  }
}

enum Part { kQuery, kKey, kValue };
constexpr Part kNormedParts[] = {kQuery, kKey};

template <class T>
const T* part_row(const LinearAttentionArgs& args, int64_t row, Part part) {
  const int64_t cols = args.heads * args.head_dim;
  return static_cast<const T*>(args.qkv) + (row * 3 + part) * cols;
}

template <class T>
void scale_rows(const LinearAttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t cols = args.heads * args.head_dim;
  for (int64_t row = begin; row < end; ++row) {
    for (Part part : kNormedParts) {
      const T* x = part_row<T>(args, row, part);
      args.scales[row * 2 + part] = 1.0f / std::sqrt(mean_square(x, cols) + args.norm_eps);
    }
  }
}

constexpr int64_t kLine = 64;          // bytes of a cache line
constexpr int64_t kPrefetchHeads = 2;  // how far ahead of its use a head is fetched

// One head of `count` rows as float32 with zeros up to the stride; q and k normed and rectified.
template <class T>
void load_head(const LinearAttentionArgs& args, int64_t first_row, int64_t count, int64_t head,
               Part part, float* out) {
  const int64_t stride = args.stride;
  const void* norm = part == kQuery ? args.q_norm : part == kKey ? args.k_norm : nullptr;
  const T* weight = static_cast<const T*>(norm) + (norm != nullptr ? head * args.head_dim : 0);
  for (int64_t i = 0; i < count; ++i) {
    const T* x = part_row<T>(args, first_row + i, part) + head * args.head_dim;
    float* row = out + i * stride;
    // The heads of a row are neighbours, but its next one is read many rows later.
    for (int64_t c = 0; c < args.head_dim; c += kLine / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(x + kPrefetchHeads * args.head_dim + c);
    }
    if (norm != nullptr) {
      const float scale = args.scales[(first_row + i) * 2 + part];
#pragma omp simd
      for (int64_t c = 0; c < args.head_dim; ++c) {
        row[c] = round_to<T>(round_to<T>(to_float(x[c]) * scale) * to_float(weight[c]));
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < args.head_dim; ++c) row[c] = to_float(x[c]);
    }
    if (part != kValue) {
#pragma omp simd
      for (int64_t c = 0; c < args.head_dim; ++c) row[c] = row[c] < 0.0f ? 0.0f : row[c];
    }
    for (int64_t c = args.head_dim; c < stride; ++c) row[c] = 0;
  }
}

constexpr int kStateVectors = 2;
static_assert(kStatePad % (kStateVectors * kLanes) == 0 && kStatePad % kTileRows == 0);
static_assert(kAttentionTokens % kTileRows == 0);

// Adds k^T v and the sum of k of some tokens to the state of one head.
void add_to_state(const float* k, const float* v, int64_t count, int64_t stride, float* state) {
  transposed_product<true>(k, v, count, stride, state);
  float* key_sum = state + stride * stride;
  for (int64_t t = 0; t < count; ++t) {
#pragma omp simd
    for (int64_t i = 0; i < stride; ++i) key_sum[i] += k[t * stride + i];
  }
}

// Tokens outside, heads inside: a tile of tokens is read from memory once, and the states of the
// heads, which are smaller, pass through the second-level cache instead.
template <class T>
void state_of_heads(const LinearAttentionArgs& args, int64_t batch, int64_t begin, int64_t end) {
  const int64_t stride = args.stride;
  float k[kAttentionTokens * kMaxLinearHeadDim];
  float v[kAttentionTokens * kMaxLinearHeadDim];
  float* states = args.states + batch * args.heads * args.state_floats;
  std::memset(states + begin * args.state_floats, 0,
              static_cast<size_t>((end - begin) * args.state_floats) * sizeof(float));
  for (int64_t token = 0; token < args.tokens; token += kAttentionTokens) {
    const int64_t left = args.tokens - token;
    const int64_t count = left < kAttentionTokens ? left : kAttentionTokens;
    const int64_t row = batch * args.tokens + token;
    for (int64_t head = begin; head < end; ++head) {
      load_head<T>(args, row, count, head, kKey, k);
      load_head<T>(args, row, count, head, kValue, v);
      add_to_state(k, v, count, stride, states + head * args.state_floats);
    }
  }
}

template <class T>
void output_tile(const LinearAttentionArgs& args, int64_t tile) {
  const int64_t tiles = (args.tokens + kAttentionTokens - 1) / kAttentionTokens;
  const int64_t batch = tile / tiles;
  const int64_t token = tile % tiles * kAttentionTokens;
  const int64_t left = args.tokens - token;
  const int64_t count = left < kAttentionTokens ? left : kAttentionTokens;
  const int64_t row = batch * args.tokens + token;
  const int64_t stride = args.stride;
  float q[kAttentionTokens * kMaxLinearHeadDim];
  float out[kAttentionTokens * kMaxLinearHeadDim];
  for (int64_t head = 0; head < args.heads; ++head) {
    const float* state = args.states + (batch * args.heads + head) * args.state_floats;
    const float* key_sum = state + stride * stride;
    load_head<T>(args, row, count, head, kQuery, q);
    for (int64_t t = 0; t < count; t += kTileRows) {
      const float* rows[kTileRows];
      // Past the last token the last one again: its results are not stored.
      for (int r = 0; r < kTileRows; ++r) {
        rows[r] = q + (t + r < count ? t + r : count - 1) * stride;
      }
      for (int64_t j = 0; j < stride; j += kStateVectors * kLanes) {
        register_tile<kStateVectors, false>(rows, 1, state + j, stride, args.head_dim,
                                            out + t * stride + j, stride);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      float weight = 0;
#pragma omp simd reduction(+ : weight)
      for (int64_t i = 0; i < stride; ++i) weight += q[t * stride + i] * key_sum[i];
      const float divisor = weight + args.eps;
      T* y = static_cast<T*>(args.y) + ((row + t) * args.heads + head) * args.head_dim;
#pragma omp simd
      for (int64_t c = 0; c < args.head_dim; ++c) {
        y[c] = from_float<T>(out[t * stride + c] / divisor);
      }
    }
  }
}

}  // namespace

void modulate(const ModulateArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { modulate_rows<decltype(type)>(args, begin, end); });
}

void gated_residual(const GatedResidualArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { gated_residual_rows<decltype(type)>(args, begin, end); });
}

void euler_step(const EulerStepArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { euler_step_range<decltype(type)>(args, begin, end); });
}

void linear_attention_scales(const LinearAttentionArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { scale_rows<decltype(type)>(args, begin, end); });
}

void linear_attention_state(const LinearAttentionArgs& args, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t batch = begin / args.heads;
    const int64_t first = begin % args.heads;
    const int64_t left = args.heads - first;
    const int64_t count = left < end - begin ? left : end - begin;
    with_dtype(args.dtype, [&](auto type) {
      state_of_heads<decltype(type)>(args, batch, first, first + count);
    });
    begin += count;
  }
}

void linear_attention_output(const LinearAttentionArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    with_dtype(args.dtype, [&](auto type) { output_tile<decltype(type)>(args, tile); });
  }
}

}  // namespace kelix::KELIX_ISA
