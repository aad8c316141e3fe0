#include "ops/check.h"

#include <torch/csrc/stable/device.h>

#include <stdexcept>

namespace kelix {
namespace {

std::string device_text(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  return "cuda:" + std::to_string(device.index());
}

}  // namespace

void fail(const std::string& op, const std::string& message) {
  throw std::runtime_error(op + ": " + message);
}

std::string words(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(tensor.size(i));
  }
  return text + "]";
}

std::string words(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Char:
      return "int8";
    default:
      return torch::headeronly::toString(dtype);
  }
}

const int64_t* Check::find(std::string_view name) const {
  for (const auto& entry : bound_) {
    if (entry.first == name) return &entry.second;
  }
  return nullptr;
}

int64_t Check::operator[](std::string_view name) const {
  const int64_t* size = find(name);
  if (size == nullptr) fail(op_, "dimension " + std::string(name) + " was never bound");
  return *size;
}

std::string Check::wanted_text(std::initializer_list<Dim> dims) const {
  std::string text = "[";
  for (const Dim& dim : dims) {
    if (text.size() > 1) text += ", ";
    const int64_t* known = dim.size >= 0 ? &dim.size : find(dim.name);
    text += dim.name;
    if (known != nullptr) {
      if (!dim.name.empty()) text += '=';
      text += std::to_string(*known);
    }
  }
  return text + "]";
}

Check& Check::shape(const Tensor& tensor, const char* name, std::initializer_list<Dim> dims) {
  const Dim* first = dims.begin();
  const bool open = first != dims.end() && first->name == "...";
  const int64_t fixed = static_cast<int64_t>(dims.size()) - (open ? 1 : 0);
  bool fits = open ? tensor.dim() >= fixed : tensor.dim() == fixed;
  std::vector<std::pair<std::string_view, int64_t>> fresh;
  for (int64_t i = 0; fits && i < fixed; ++i) {
    const Dim& dim = first[i + (open ? 1 : 0)];
    const int64_t size = tensor.size(tensor.dim() - fixed + i);
    const int64_t* known = dim.size >= 0 ? &dim.size : find(dim.name);
    fits = known == nullptr || *known == size;
    if (find(dim.name) == nullptr && !dim.name.empty()) fresh.emplace_back(dim.name, size);
  }
  if (!fits) rule(false, name, tensor, "must have shape ", wanted_text(dims));
  bound_.insert(bound_.end(), fresh.begin(), fresh.end());
  return device(tensor, name);
}

Check& Check::dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
  const ScalarType got = tensor.scalar_type();
  if (got == wanted) return *this;
  return rule(false, name, got, "must be ", wanted);
}

Check& Check::storage(const Tensor& tensor, const char* name) {
  const ScalarType got = tensor.scalar_type();
  if (!storage_scalar_) {
    rule(got == ScalarType::Float || got == ScalarType::BFloat16 || got == ScalarType::Half, name,
         got, "must be float32, bfloat16 or float16");
    storage_scalar_ = got;
    storage_owner_ = name;
    storage_type_ = got == ScalarType::Float      ? DType::kFloat32
                    : got == ScalarType::BFloat16 ? DType::kBFloat16
                                                  : DType::kFloat16;
  }
  if (got == *storage_scalar_) return *this;
  return rule(false, name, got, "must be ", *storage_scalar_, " like ", storage_owner_);
}

Check& Check::device(const Tensor& tensor, const char* name) {
  const torch::stable::Device got = tensor.device();
  if (!device_) {
    device_ = got;
    device_owner_ = name;
  }
  if (got == *device_) return *this;
  return rule(false, name, device_text(got), "must be on ", device_text(*device_), " like ",
              device_owner_);
}

Check& Check::contiguous(const Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) return *this;
  return rule(false, name, "a strided view",
              "must be contiguous, it is used without a copy (call .contiguous() first)");
}

}  // namespace kelix
