// What the resident in-block loop computes in every CTA for itself: which linear map a step is, and
// its input (norm, attention, activation) in shared memory.
#pragma once

#include "kernels/block_decoder_parts.cuh"

namespace kelix::cuda {

inline constexpr int kResidentThreads = kDrawThreads;
inline constexpr int kResidentWarps = kResidentThreads / kWarpSize;
inline constexpr int kMaxResidentRows = 8;

// The rows that still draw, and the id that each drew last.
struct LivingRows {
  int count;
  int row[kMaxResidentRows];
  int64_t id[kMaxResidentRows];
};

struct ResidentShared {
  DrawShared draw;
  LivingRows living;
  float sums[kMaxResidentRows][kDecoderWarps];
  float squares[kMaxResidentRows][kDecoderWarps];
};

// How a linear map's input comes into shared memory, [living rows, in].
enum class Staging { kSlotInput, kLayerNorm, kAttention, kCopy, kHeadNorm };

template <class T>
struct SlotStep {
  Staging staging;
  int64_t layer;
  const T* norm_weight;
  const T* norm_bias;
  LinearArgs<T> linear;  // with a scale its weights are int8 whatever their type says
  bool gated;            // the outputs are silu(first half of the weights) * second half
  bool weights_once;     // read once per slot: not worth a place in the cache
};

__host__ __device__ __forceinline__ int64_t steps_per_slot(const BlockDecoderArgs& args) {
  return 4 * args.num_layers + 3;
}

// Floats of dynamic shared memory: the widest input, or the candidates of a draw that every CTA
// repeats.
inline int64_t resident_floats(const BlockDecoderArgs& args, bool draws_everywhere) {
  const int64_t widest = max(max(args.input_dim, args.d_model), args.ffn);
  int64_t candidates = 0;
  for (int64_t slot = 0; draws_everywhere && slot < args.num_codes; ++slot) {
    const int64_t width = head_slice(args, slot).width;
    if (!is_wide(width)) candidates = max(candidates, 2 * width);
  }
  return max(args.batch * widest, candidates);
}

template <class T>
__device__ __forceinline__ LinearArgs<T> linear_map(const T* weight, const T* bias, int64_t in,
                                                    int64_t out, const float* x, float* y) {
  LinearArgs<T> linear{};
  linear.weight = weight;
  linear.bias = bias;
  linear.in = in;
  linear.out = out;
  linear.x = x;
  linear.y = y;
  return linear;
}

template <class T>
__device__ __forceinline__ SlotStep<T> layer_step(const BlockDecoderArgs& args, int64_t layer,
                                                  int64_t part) {
  const BlockDecoderLayout& at = args.layout;
  const BlockDecoderWorkspace& work = args.work;
  const T* w = static_cast<const T*>(args.weights) + at.first_layer + layer * at.layer_size;
  const T* none = nullptr;
  const int64_t d = args.d_model, ffn = args.ffn;
  SlotStep<T> step{};
  step.layer = layer;
  if (part == 0) {
    step.staging = Staging::kLayerNorm;
    step.norm_weight = w + at.sa_norm_weight;
    step.norm_bias = w + at.sa_norm_bias;
    step.linear = linear_map(w + at.qkv_weight, w + at.qkv_bias, d, 3 * d, work.x, work.qkv);
  } else if (part == 1) {
    step.staging = Staging::kAttention;
    step.linear = linear_map(w + at.output_weight, w + at.output_bias, d, d, work.qkv, work.x);
    step.linear.added = work.x;
  } else if (part == 2) {
    step.staging = Staging::kLayerNorm;
    step.norm_weight = w + at.mlp_norm_weight;
    step.norm_bias = w + at.mlp_norm_bias;
    step.linear = linear_map(w + at.gate_up_weight, none, d, ffn, work.x, work.activated);
    step.gated = true;
  } else {
    step.staging = Staging::kCopy;
    step.linear = linear_map(w + at.down_weight, none, ffn, d, work.activated, work.x);
    step.linear.added = work.x;
  }
  return step;
}

// Bytes of one weight of the head.
template <class T>
__device__ __forceinline__ int64_t head_element(const BlockDecoderArgs& args) {
  return args.head_scale != nullptr ? sizeof(int8_t) : sizeof(T);
}

template <class T>
__device__ __forceinline__ const void* head_row(const BlockDecoderArgs& args, int64_t row) {
  return static_cast<const char*>(args.head) + row * args.input_dim * head_element<T>(args);
}

template <class T>
__device__ __forceinline__ SlotStep<T> slot_step(const BlockDecoderArgs& args, int64_t slot,
                                                 int64_t index) {
  const BlockDecoderLayout& at = args.layout;
  const BlockDecoderWorkspace& work = args.work;
  const T* w = static_cast<const T*>(args.weights);
  const int64_t d = args.d_model, wide = args.input_dim, last = steps_per_slot(args) - 1;
  if (index > 0 && index < last - 1) return layer_step<T>(args, (index - 1) / 4, (index - 1) % 4);
  SlotStep<T> step{};
  if (index == 0) {
    step.staging = Staging::kSlotInput;
    step.linear = linear_map(w + at.input_weight, w + at.input_bias, wide, d, work.input, work.x);
    step.linear.position = w + at.position + slot * d;
  } else if (index < last) {
    step.staging = Staging::kCopy;
    step.linear = linear_map(w + at.final_weight, w + at.final_bias, d, wide, work.x, work.output);
    step.linear.added = work.input;
  } else {
    const HeadSlice slice = head_slice(args, slot);
    const T *head = static_cast<const T*>(head_row<T>(args, slice.first)), *none = nullptr;
    step.staging = Staging::kHeadNorm;
    step.norm_weight = static_cast<const T*>(args.head_norm);
    step.linear = linear_map(head, none, wide, slice.width, work.output, work.logits);
    if (args.head_scale != nullptr) step.linear.scale = args.head_scale + slice.first;
    step.weights_once = true;
  }
  return step;
}

// Leaves a sum over the columns of each living row in `sums`, a part per warp: kDecoderThreads
// threads per row, so that the order of the additions is that of the kernels per step. term_of(r)
// gives the function of the column whose values are added.
template <class TermOf>
__device__ void sum_rows(int64_t cols, const LivingRows& living,
                         float (&sums)[kMaxResidentRows][kDecoderWarps], const TermOf& term_of) {
  constexpr int kGroups = kResidentThreads / kDecoderThreads;
  for (int r = threadIdx.x / kDecoderThreads; r < living.count; r += kGroups) {
    const auto term = term_of(r);
    float sum = 0;
    for (int64_t c = threadIdx.x % kDecoderThreads; c < cols; c += kDecoderThreads) sum += term(c);
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0) sums[r][threadIdx.x / kWarpSize % kDecoderWarps] = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ float total_of(const float (&sums)[kDecoderWarps]) {
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kDecoderWarps; ++warp) total += sums[warp];
  return total;
}

// All columns of each living row; of_row(r, row) gives the function of the column to call.
template <class OfRow>
__device__ __forceinline__ void for_elements(const LivingRows& living, int64_t cols,
                                             const OfRow& of_row) {
  for (int r = 0; r < living.count; ++r) {
    const auto f = of_row(r, living.row[r]);
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < cols; c += kResidentThreads) f(c);
  }
}

__device__ inline void stage_copy(const float* from, int64_t cols, const LivingRows& living,
                                  float* tile) {
  for_elements(living, cols, [&](int r, int64_t row) {
    const float* x = from + row * cols;
    float* y = tile + r * cols;
    return [=](int64_t c) { y[c] = x[c]; };
  });
  __syncthreads();
}

template <class T>
__device__ void stage_slot_input(const BlockDecoderArgs& args, int64_t slot,
                                 const LivingRows& living, float* tile) {
  const int64_t cols = args.input_dim;
  const bool keeps = blockIdx.x == 0;
  for_elements(living, cols, [&](int r, int64_t row) {
    const T* source = slot_input<T>(args, row, slot, living.id[r]);
    float* kept = args.work.input + row * cols;  // added again behind the layers
    float* y = tile + r * cols;
    return [=](int64_t c) {
      y[c] = to_float(source[c]);
      if (keeps) kept[c] = y[c];
    };
  });
  __syncthreads();
}

template <class T>
__device__ void stage_layer_norm(const SlotStep<T>& step, ResidentShared& shared, float* tile) {
  const LivingRows& living = shared.living;
  const int64_t cols = step.linear.in;
  stage_copy(step.linear.x, cols, living, tile);
  sum_rows(cols, living, shared.sums, [&](int r) {
    const float* x = tile + r * cols;
    return [=](int64_t c) { return x[c]; };
  });
  sum_rows(cols, living, shared.squares, [&](int r) {
    const float* x = tile + r * cols;
    const float mean = total_of(shared.sums[r]) / cols;
    return [=](int64_t c) { return squared_distance(x[c], mean); };
  });
  for_elements(living, cols, [&](int r, int64_t) {
    const float mean = total_of(shared.sums[r]) / cols;
    const float scale = layer_norm_scale(total_of(shared.squares[r]), cols);
    const T *weight = step.norm_weight, *bias = step.norm_bias;
    float* x = tile + r * cols;
    return [=](int64_t c) {
      x[c] = layer_norm_value(x[c], mean, scale, to_float(weight[c]), to_float(bias[c]));
    };
  });
  __syncthreads();
}

template <class T>
__device__ void stage_head_norm(const BlockDecoderArgs& args, const SlotStep<T>& step,
                                ResidentShared& shared, float* tile) {
  const LivingRows& living = shared.living;
  const int64_t cols = step.linear.in;
  stage_copy(step.linear.x, cols, living, tile);
  sum_rows(cols, living, shared.squares, [&](int r) {
    const float* x = tile + r * cols;
    return [=](int64_t c) { return x[c] * x[c]; };
  });
  for_elements(living, cols, [&](int r, int64_t) {
    const float scale = head_norm_scale(total_of(shared.squares[r]), cols, args.norm_eps);
    const T* weight = step.norm_weight;
    float* x = tile + r * cols;
    return [=](int64_t c) { x[c] *= scale * to_float(weight[c]); };
  });
  __syncthreads();
}

// A warp per living row and head. The first CTA keeps the keys and values for the slots to come.
__device__ inline void stage_attention(const BlockDecoderArgs& args, int64_t layer, int64_t slot,
                                       const LivingRows& living, float* tile) {
  const int heads = static_cast<int>(args.num_heads);
  const int64_t d = args.d_model, head_dim = d / heads;
  for (int unit = threadIdx.x / kWarpSize; unit < living.count * heads; unit += kResidentWarps) {
    const int r = unit / heads;
    const int64_t row = living.row[r], start = unit % heads * head_dim;
    const float* qkv = args.work.qkv + row * 3 * d + start;
    float* cache = slot_cache(args, row, layer) + start;
    attend(qkv, cache, d, head_dim, slot, tile + r * d + start);
    if (blockIdx.x == 0) store_key_value(qkv, cache, d, head_dim, slot);
  }
  __syncthreads();
}

template <class T>
__device__ void stage(const BlockDecoderArgs& args, const SlotStep<T>& step, int64_t slot,
                      ResidentShared& shared, float* tile) {
  switch (step.staging) {
    case Staging::kSlotInput:
      return stage_slot_input<T>(args, slot, shared.living, tile);
    case Staging::kLayerNorm:
      return stage_layer_norm(step, shared, tile);
    case Staging::kAttention:
      return stage_attention(args, step.layer, slot, shared.living, tile);
    case Staging::kCopy:
      return stage_copy(step.linear.x, step.linear.in, shared.living, tile);
    case Staging::kHeadNorm:
      return stage_head_norm(args, step, shared, tile);
  }
}

}  // namespace kelix::cuda
