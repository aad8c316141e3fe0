// Launches: what the <<<>>> of nvcc becomes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "simt/vector_types.h"

namespace simt {

enum class Residency {
  kSequential,  // one CTA after the other: no CTA may wait for a later one
  kTogether     // all CTAs alive at once, as a cooperative launch promises
};

// Runs body(), which calls `kernel`, once per thread. Errors are kept for cudaGetLastError, as on a
// GPU.
void launch(const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared, Residency residency,
            const std::function<void()>& body);

// How many kernels have run since the process began.
int64_t launch_count();

// Of the GPU that is imitated, as launchers see it: 10 major + minor.
int& compute_capability();

// Error text of the last launches, empty when all went well; forgets it.
std::string take_error();

}  // namespace simt

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace kelix {

// Few enough that kernels which share work out over the device do so at the sizes of tests.
inline int num_multiprocessors() { return 2; }
inline int compute_capability() { return simt::compute_capability(); }

template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared,
                   cudaStream_t, const Arguments&... arguments) {
  simt::launch(reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared,
               simt::Residency::kSequential, [&] { kernel(arguments...); });
}

// The CTAs may wait for each other. All of them fit.
template <class... Parameters, class... Arguments>
bool launch_kernel_together(void (*kernel)(Parameters...), dim3 grid, dim3 block,
                            size_t dynamic_shared, cudaStream_t, const Arguments&... arguments) {
  simt::launch(reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared,
               simt::Residency::kTogether, [&] { kernel(arguments...); });
  return true;
}

}  // namespace kelix
