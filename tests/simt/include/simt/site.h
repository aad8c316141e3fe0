// Return addresses as source lines, inlined callers included.
#pragma once

#include <string>

namespace simt {

// "warp_sum (device.cuh:55) in rms_norm_kernel (norm.cuh:31)", innermost first; the address itself
// where there is no debug information. The answers are kept.
const std::string& source_of(const void* return_address);

// Name of the function that starts at an address, without template arguments.
std::string function_name(const void* address);

}  // namespace simt
