// Arguments of the codes stem, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace kelix {

// codes[t, n] = argmin_k |zn - C_k|^2 with zn = LayerNorm(z[t, n]) rounded to the dtype, lowest
// index on ties; index 0 where no distance is smaller than +inf (a NaN row).
// exact: the smallest norms_k - 2 zn.C_k. reference: the distance goes through the roundings of
// torch.cdist in its matrix form, squared again, all in the dtype of z.
struct NearestCodesArgs {
  const void* z;             // [tokens, books, dim]
  const void* codebooks;     // [books, codes, dim]
  const float* norms;        // [books, codes]
  const void* ln_weight;     // [books, dim] or null: z is used as it is
  const void* ln_bias;       // [books, dim] or null
  const float* token_norms;  // [tokens, books], CUTLASS in reference mode only
  int64_t* indices;          // [tokens, books]
  float* workspace;          // CPU only: slots * floats of csrc/cpu/codes.h
  int64_t slots;             // CPU only
  int64_t tokens;
  int64_t books;
  int64_t codes;
  int64_t dim;
  float eps;
  bool reference;
  DType dtype;
};

// y = sum of the embeddings of the ids before the first block_end, the last id never included. A
// text row (first id below text_vocab) repeats its first embedding instead.
struct BlockEmbedArgs {
  const int64_t* ids;  // [rows, slots]
  const void* table;   // [vocab, cols]
  void* y;             // [rows, cols]
  int64_t rows;
  int64_t slots;
  int64_t cols;
  int64_t vocab;
  int64_t text_vocab;
  int64_t block_end;
  DType dtype;
};

}  // namespace kelix
