#include "cpu/activation.h"

#include "cpu/simd.h"

namespace kelix::KELIX_ISA {

void silu_mul(const SiluMulArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = static_cast<const T*>(args.x) + row * 2 * args.cols;
      const T* up = gate + args.cols;
      T* y = static_cast<T*>(args.y) + row * args.cols;
#pragma omp simd
      for (int64_t c = 0; c < args.cols; ++c) {
        y[c] = from_float<T>(silu_simd(to_float(gate[c])) * to_float(up[c]));
      }
    }
  });
}

}  // namespace kelix::KELIX_ISA
