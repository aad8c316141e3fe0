// Launcher of the sm_90a form of nearest_codes, for codes.cu, which decides when to use it.
#pragma once

#include "common/codes.h"

namespace kelix::cuda {

struct CodesGrid;

inline constexpr int kCodesHopperTokens = 256;  // of a CTA, at most
inline constexpr int kCodesHopperGroup = 64;    // a CTA takes a multiple of them
inline constexpr int kCodesHopperCodes = 128;   // of a tile

#ifdef KELIX_HOPPER  // sm_90a is among the architectures of this build
inline constexpr bool kCodesHopperBuilt = true;
// Null, or why it could not be launched.
const char* launch_codes_hopper(const NearestCodesArgs& args, const CodesGrid& grid, void* stream);
#else
inline constexpr bool kCodesHopperBuilt = false;
inline const char* launch_codes_hopper(const NearestCodesArgs&, const CodesGrid&, void*) {
  return "built without sm_90a";
}
#endif

}  // namespace kelix::cuda
