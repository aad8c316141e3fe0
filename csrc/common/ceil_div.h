// How many pieces of a size cover a length.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace kelix {

KELIX_HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

}  // namespace kelix
