// Launcher of the CUTLASS form of nearest_codes, a contender of the hand-written ones on sm_90a.
#pragma once

#include "common/codes.h"

namespace kelix::cuda {

#if defined(KELIX_CUTLASS) && defined(KELIX_HOPPER)
inline constexpr bool kCodesCutlassBuilt = true;
// Merges keys, smaller where a code is nearer, into args.indices, which the caller has set to the
// largest key. Null, or why it could not be launched. args.ln_weight is null: z is normalised.
const char* launch_codes_cutlass(const NearestCodesArgs& args, void* stream);
#else
inline constexpr bool kCodesCutlassBuilt = false;
inline const char* launch_codes_cutlass(const NearestCodesArgs&, void*) {
  return "built without CUTLASS";
}
#endif

}  // namespace kelix::cuda
