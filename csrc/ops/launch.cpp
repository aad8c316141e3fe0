#include "ops/launch.h"

#include <dlfcn.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace kelix {
namespace {

// Looked up at run time, so that one library loads under a CPU-only torch and under a CUDA one.
using StreamGetter = int32_t (*)(int32_t device, void** stream);

StreamGetter stream_getter() {
  static const StreamGetter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<StreamGetter>(symbol);
  }();
  return getter;
}

int32_t aoti_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      fail("new_tensor", "no operator returns " + words(dtype));
  }
}

}  // namespace

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, sizes[i]);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  // The direct entry point skips the boxed dispatcher.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), aoti_dtype(dtype), device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor new_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return new_tensor(std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type(), like);
}

ParallelFor torch_parallel_for() {
  return ParallelFor([](int64_t size, int64_t grain, ParallelFor::Body body, void* context) {
    torch::stable::parallel_for(0, size, grain,
                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
  });
}

void* current_stream(const Tensor& tensor) {
  if (stream_getter() == nullptr) fail("kelix_rt", "this torch was built without CUDA");
  void* stream = nullptr;
  if (stream_getter()(tensor.get_device_index(), &stream) != 0) {
    fail("kelix_rt", "torch did not give its current CUDA stream");
  }
  return stream;
}

void check_launch(const char* op, const char* error) {
  if (error != nullptr) fail(op, error);
}

void throw_built_without_cuda(const char* op) {
  fail(op,
       "got CUDA tensors, but kelix_rt was built without nvcc; rebuild with "
       "`pip install -e '.[cuda]' && pip install -e .` in its sources");
}

}  // namespace kelix
