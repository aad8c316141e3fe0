// Stands in for the CUDA headers: kernels and launchers compile as C++20 and run on the CPU, each
// CUDA thread a fiber. csrc/common/device.cuh includes it when KELIX_SIMT is defined.
#pragma once

#include "simt/atomics.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/numbers.h"
#include "simt/shared.h"
#include "simt/state.h"
#include "simt/vector_types.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::current->cta->index)
#define blockDim (::simt::active->block)
#define gridDim (::simt::active->grid)

// What device.cuh spells with CUDA's own syntax.
#define KELIX_SHARED(type, name, ...)                           \
  using name##_shared_type = type __VA_ARGS__;                  \
  static char name##_shared_key;                                \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::simt::shared_array(&name##_shared_key, sizeof(name##_shared_type), #name))

#define KELIX_NOINLINE __attribute__((noinline))

#define KELIX_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::simt::dynamic_shared())
