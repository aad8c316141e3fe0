// Arguments of the sampling stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace kelix {

// How one row is drawn (the rules: kelix_rt/ops/sampling.py).
struct DrawRule {
  float temperature, top_k, top_p, min_p;
  int64_t seed, step, slot;
  int64_t first_id;  // the id of column 0
  bool reference;
};

struct SampleArgs {
  const void* logits;    // [rows, cols]
  const float* params;   // [rows, 4]
  const int64_t* seeds;  // [rows], likewise steps and slots
  const int64_t* steps;
  const int64_t* slots;
  int64_t* ids;      // [rows]
  float* logprobs;   // [rows]
  float* workspace;  // [rows, draw_workspace(cols)] on CUDA, one row of it per thread on the CPU
  int64_t rows;
  int64_t cols;
  int64_t first_id;
  bool reference;
  DType dtype;
};

namespace {

// Columns summarised by their maximum before anything is compared one by one (CPU).
constexpr int64_t kDrawChunk = 64;

// Floats of scratch that drawing from a row takes: the row in float32, the kept candidates
// (distance from the maximum, column, weight), and the chunk maxima.
[[maybe_unused]] KELIX_HOST_DEVICE constexpr int64_t draw_workspace(int64_t cols) {
  return 4 * cols + (cols + kDrawChunk - 1) / kDrawChunk;
}

}  // namespace
}  // namespace kelix
