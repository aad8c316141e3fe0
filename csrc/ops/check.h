// Checks with named dimensions: an operator names the shape it wants once, and every error says
// which tensor broke which rule and what it was given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/dtype.h"

namespace kelix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One wanted dimension: a name ("N"), a fixed size (3), or both ("d", 128).
struct Dim {
  Dim(const char* name) : name(name) {}  // NOLINT: meant to convert
  Dim(int64_t size) : size(size) {}      // NOLINT
  Dim(int size) : size(size) {}          // NOLINT
  Dim(const char* name, int64_t size) : name(name), size(size) {}
  std::string_view name;
  int64_t size = -1;
};

// Throws std::runtime_error(op + ": " + message); torch raises it as RuntimeError.
[[noreturn]] void fail(const std::string& op, const std::string& message);

// What errors are made of; of a tensor its shape.
inline std::string words(const std::string& text) { return text; }
inline std::string words(int64_t number) { return std::to_string(number); }
std::string words(ScalarType dtype);
std::string words(const Tensor& tensor);

// The checks of one call. Dimension names are bound by the first tensor that uses them. What holds
// costs no string: a small kernel takes less time than a few allocations.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // `tensor` has exactly these dimensions; "..." as the first one stands for any number.
  Check& shape(const Tensor& tensor, const char* name, std::initializer_list<Dim> dims);
  Check& dtype(const Tensor& tensor, const char* name, ScalarType wanted);
  // float32, bfloat16 or float16; later calls must agree with the first.
  Check& storage(const Tensor& tensor, const char* name);
  // On the device of the first tensor checked.
  Check& device(const Tensor& tensor, const char* name);
  Check& contiguous(const Tensor& tensor, const char* name);
  // Any other rule: "<op>: <name> <wanted>, got <got>".
  template <class Got, class... Wanted>
  Check& rule(bool holds, const char* name, const Got& got, const Wanted&... wanted) {
    if (!holds) fail(op_, std::string(name) + " " + (words(wanted) + ...) + ", got " + words(got));
    return *this;
  }

  int64_t operator[](std::string_view name) const;
  DType storage_type() const { return storage_type_; }

 private:
  std::string wanted_text(std::initializer_list<Dim> dims) const;
  const int64_t* find(std::string_view name) const;

  const char* op_;
  std::vector<std::pair<std::string_view, int64_t>> bound_;
  std::optional<ScalarType> storage_scalar_;
  const char* storage_owner_ = nullptr;
  DType storage_type_ = DType::kFloat32;
  std::optional<torch::stable::Device> device_;
  const char* device_owner_ = nullptr;
};

}  // namespace kelix
