// Storage types shared by every layer; arithmetic is always float32.
#pragma once

#include <cstdint>

namespace kelix {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace kelix
