// Nearest codes: a matrix product whose scores are folded into a running minimum per token and
// never stored. The vector lanes run over tokens: the codes are then read in their own layout, one
// broadcast at a time, and the minimum needs no reduction across lanes.
#include "cpu/codes.h"

#include <cmath>

#include "cpu/register_tile.h"
#include "cpu/simd.h"

namespace kelix::KELIX_ISA {
namespace {

constexpr int kMaxTileTokens = kTileVectors * kLanes;
static_assert(kCodeTokens % kMaxTileTokens == 0 && kCodeTile % kTileRows == 0);

// The running minimum of a block of tokens.
struct Best {
  float score[kCodeTokens];  // smallest score so far
  float value[kCodeTokens];  // reference mode: that score after its roundings
  int32_t code[kCodeTokens];
  float token_norm[kCodeTokens];  // reference mode: |zn|^2
};

// LayerNorm of `token` of `book`, rounded to T, into column `lane` of the transposed `panel`.
template <class T>
void pack_token(const NearestCodesArgs& args, int64_t token, int64_t book, float* panel,
                int64_t stride, float* token_norm) {
  const int64_t dim = args.dim;
  const T* z = static_cast<const T*>(args.z) + (token * args.books + book) * dim;
  const T* weight = static_cast<const T*>(args.ln_weight);
  const T* bias = static_cast<const T*>(args.ln_bias);
  float mean = 0;
  float scale = 1;
  if (weight != nullptr || bias != nullptr) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; ++i) sum += to_float(z[i]);
    mean = sum / static_cast<float>(dim);
    float square_sum = 0;
#pragma omp simd reduction(+ : square_sum)
    for (int64_t i = 0; i < dim; ++i) {
      const float v = to_float(z[i]) - mean;
      square_sum += v * v;
    }
    scale = 1.0f / std::sqrt(square_sum / static_cast<float>(dim) + args.eps);
  }
  float norm = 0;
  for (int64_t i = 0; i < dim; ++i) {
    const float gain = weight != nullptr ? to_float(weight[book * dim + i]) : 1.0f;
    const float shift = bias != nullptr ? to_float(bias[book * dim + i]) : 0.0f;
    const float v = round_to<T>((to_float(z[i]) - mean) * scale * gain + shift);
    panel[i * stride] = v;
    norm += round_to<T>(v * v);
  }
  *token_norm = round_to<T>(norm);
}

// `count` codes from `first` on as float32 rows: the codebook itself, or a widened copy.
template <class T>
const float* widen_codes(const T* codes, int64_t count, int64_t dim, float* scratch) {
  if constexpr (sizeof(T) == 4) {
    (void)count, (void)dim, (void)scratch;
    return codes;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count * dim; ++i) scratch[i] = to_float(codes[i]);
    return scratch;
  }
}

// Folds the products of one code with `tokens` tokens into their minimum.
void fold_exact(const float* dots, float norm, int32_t code, int tokens, float* score,
                int32_t* index) {
#pragma omp simd
  for (int t = 0; t < tokens; ++t) {
    const float s = norm - 2.0f * dots[t];
    const bool better = s < score[t];
    index[t] = better ? code : index[t];
    score[t] = better ? s : score[t];
  }
}

// The same with the roundings of the reference. They are monotone, so a score that is not the
// smallest so far cannot become the smallest value, and almost all codes skip them.
template <class T>
void fold_reference(const float* dots, float norm, int32_t code, int tokens,
                    const float* token_norm, float* score, float* value, int32_t* index) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int t = 0; t < tokens; ++t) {
    any |= token_norm[t] + norm - 2.0f * dots[t] < score[t] ? 1 : 0;
  }
  if (any == 0) return;
#pragma omp simd
  for (int t = 0; t < tokens; ++t) {
    const float s = token_norm[t] + norm - 2.0f * dots[t];
    const float r = round_to<T>(s);
    const float u = round_to<T>(std::sqrt(r > 0.0f ? r : 0.0f));
    const float v = round_to<T>(u * u);
    const bool better = s < score[t] && v < value[t];
    index[t] = better ? code : index[t];
    value[t] = better ? v : value[t];
    score[t] = s < score[t] ? s : score[t];
  }
}

// All codes of one tile against Vectors * kLanes tokens.
template <class T, int Vectors>
void search_tile(const NearestCodesArgs& args, const float* codes, const float* norms,
                 int64_t first, int64_t count, const float* panel, int64_t offset, Best& best) {
  constexpr int kTokens = Vectors * kLanes;
  float dots[kTileRows * kTokens];
  for (int64_t row = 0; row < count; row += kTileRows) {
    const float* rows[kTileRows];
    const int64_t left = count - row;
    for (int r = 0; r < kTileRows; ++r) {
      rows[r] = codes + (row + (r < left ? r : left - 1)) * args.dim;
    }
    register_tile<Vectors, false>(rows, 1, panel, kTokens, args.dim, dots, kTokens);
    for (int r = 0; r < kTileRows && r < left; ++r) {
      const int32_t code = static_cast<int32_t>(first + row + r);
      const float norm = norms[row + r];
      if (args.reference) {
        fold_reference<T>(dots + r * kTokens, norm, code, kTokens, best.token_norm + offset,
                          best.score + offset, best.value + offset, best.code + offset);
      } else {
        fold_exact(dots + r * kTokens, norm, code, kTokens, best.score + offset,
                   best.code + offset);
      }
    }
  }
}

// Vectors of the tile that starts at `offset` when `tokens` are left.
int tile_vectors(int64_t tokens) {
  const int64_t wanted = (tokens + kLanes - 1) / kLanes;
  return static_cast<int>(wanted < kTileVectors ? wanted : kTileVectors);
}

template <class T>
void search_block(const NearestCodesArgs& args, int64_t book, int64_t first_token,
                  float* workspace) {
  const int64_t dim = args.dim;
  const int64_t left = args.tokens - first_token;
  const int64_t tokens = left < kCodeTokens ? left : kCodeTokens;
  float* panels = workspace;
  float* widened = workspace + kCodeTokens * dim;
  Best best;
  for (int64_t i = 0; i < kCodeTokens; ++i) {
    best.score[i] = best.value[i] = __builtin_inff();
    best.code[i] = 0;
    best.token_norm[i] = 0;
  }
  for (int64_t offset = 0; offset < tokens; offset += kMaxTileTokens) {
    const int64_t width = tile_vectors(tokens - offset) * kLanes;
    float* panel = panels + offset * dim;
    for (int64_t lane = 0; lane < width; ++lane) {
      if (offset + lane < tokens) {
        pack_token<T>(args, first_token + offset + lane, book, panel + lane, width,
                      best.token_norm + offset + lane);
      } else {
        for (int64_t i = 0; i < dim; ++i) panel[i * width + lane] = 0;
      }
    }
  }
  const T* codebook = static_cast<const T*>(args.codebooks) + book * args.codes * dim;
  for (int64_t first = 0; first < args.codes; first += kCodeTile) {
    const int64_t rest = args.codes - first;
    const int64_t count = rest < kCodeTile ? rest : kCodeTile;
    const float* codes = widen_codes(codebook + first * dim, count, dim, widened);
    const float* norms = args.norms + book * args.codes + first;
    for (int64_t offset = 0; offset < tokens; offset += kMaxTileTokens) {
      const float* panel = panels + offset * dim;
      switch (tile_vectors(tokens - offset)) {
        case 1:
          search_tile<T, 1>(args, codes, norms, first, count, panel, offset, best);
          break;
        case 2:
          search_tile<T, 2>(args, codes, norms, first, count, panel, offset, best);
          break;
        default:
          search_tile<T, kTileVectors>(args, codes, norms, first, count, panel, offset, best);
      }
    }
  }
  for (int64_t i = 0; i < tokens; ++i) {
    args.indices[(first_token + i) * args.books + book] = best.code[i];
  }
}

template <class T>
void block_embed_rows(const BlockEmbedArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 256;
  const T* table = static_cast<const T*>(args.table);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* ids = args.ids + row * args.slots;
    T* y = static_cast<T*>(args.y) + row * args.cols;
    int64_t used = 0;
    while (used < args.slots - 1 && ids[used] != args.block_end) ++used;
    const bool text = ids[0] < args.text_vocab;
    for (int64_t start = 0; start < args.cols; start += kChunk) {
      const int64_t rest = args.cols - start;
      const int64_t size = rest < kChunk ? rest : kChunk;
      float sum[kChunk] = {};
      for (int64_t slot = 0; slot < used; ++slot) {
        const T* source = table + ids[text ? 0 : slot] * args.cols + start;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) sum[c] += to_float(source[c]);
      }
#pragma omp simd
      for (int64_t c = 0; c < size; ++c) y[start + c] = from_float<T>(sum[c]);
    }
  }
}

}  // namespace

void nearest_codes(const NearestCodesArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = (args.tokens + kCodeTokens - 1) / kCodeTokens;
  for (int64_t slot = begin; slot < end; ++slot) {
    float* workspace = args.workspace + slot * nearest_codes_slot_floats(args.dim);
    for (int64_t item = slot; item < blocks * args.books; item += args.slots) {
      with_dtype(args.dtype, [&](auto type) {
        search_block<decltype(type)>(args, item / blocks, item % blocks * kCodeTokens, workspace);
      });
    }
  }
}

void block_embed(const BlockEmbedArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) { block_embed_rows<decltype(type)>(args, begin, end); });
}

}  // namespace kelix::KELIX_ISA
