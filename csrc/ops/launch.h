// What every operator needs between its checks and its kernel: contiguous inputs, fresh outputs,
// the parallel loop of the CPU and the stream of the GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "ops/check.h"

namespace kelix {

// The tensor itself when it is contiguous: the dispatcher costs more than a small kernel.
Tensor dense(const Tensor& tensor);
std::optional<Tensor> dense(const std::optional<Tensor>& tensor);

// A fresh contiguous tensor on the device of `like`.
Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like);
Tensor new_like(const Tensor& like);

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// Rows worth a thread of their own: about 16 k elements.
inline int64_t row_grain(int64_t cols) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols));
}

// torch's thread pool.
ParallelFor torch_parallel_for();

// Runs a CPU kernel over [0, size) on it.
template <class Kernel, class Args>
void run_parallel(int64_t size, int64_t grain, Kernel kernel, const Args& args) {
  torch_parallel_for()(size, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// PyTorch's current stream of the device the tensor is on; an error where this torch has no CUDA.
void* current_stream(const Tensor& tensor);

// Throws when a launcher returned an error text.
void check_launch(const char* op, const char* error);

[[noreturn]] void throw_built_without_cuda(const char* op);

// Whether the CUDA launchers take this tensor. In the build of tests/simt they run on the CPU.
#ifdef KELIX_SIMT
constexpr bool uses_cuda(const Tensor&) { return true; }
#else
inline bool uses_cuda(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

}  // namespace kelix

// Runs the CUDA launcher `function` of kelix::cuda on the current stream. Built without nvcc, it
// says how to build with it: a CUDA tensor never falls back to something slow and silent.
#if defined(KELIX_SIMT)
#define KELIX_LAUNCH_CUDA(op, tensor, function, args) \
  ::kelix::check_launch(op, ::kelix::cuda::function(args, nullptr))
#elif defined(KELIX_CUDA)
#define KELIX_LAUNCH_CUDA(op, tensor, function, args)                                          \
  do {                                                                                         \
    torch::stable::accelerator::DeviceGuard device_guard((tensor).get_device_index());         \
    ::kelix::check_launch(op, ::kelix::cuda::function(args, ::kelix::current_stream(tensor))); \
  } while (false)
#else
#define KELIX_LAUNCH_CUDA(op, tensor, function, args) \
  (static_cast<void>(args), ::kelix::throw_built_without_cuda(op))
#endif
