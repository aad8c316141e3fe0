// CPU kernels of the codes stem.
#pragma once

#include "common/codes.h"
#include "common/isa.h"

namespace kelix {

// One piece of work is one book against kCodeTokens tokens; it walks the book kCodeTile codes at a
// time, so that the tokens stay in the first-level cache and the codes in the second.
inline constexpr int64_t kCodeTokens = 96;
inline constexpr int64_t kCodeTile = 32;

// Scratch of one worker: the transposed tokens and the widened codes.
inline int64_t nearest_codes_slot_floats(int64_t dim) { return (kCodeTokens + kCodeTile) * dim; }

// nearest_codes: the workers [begin, end) of args.slots; block_embed: the rows [begin, end).
KELIX_FOR_EACH_ISA(void nearest_codes(const NearestCodesArgs& args, int64_t begin, int64_t end);
                   void block_embed(const BlockEmbedArgs& args, int64_t begin, int64_t end);)

}  // namespace kelix
