#include "cpu/linear.h"

#include <type_traits>

#include "cpu/product.h"

namespace kelix::KELIX_ISA {
namespace {

template <class T, class W>
void multiply(const SkinnyLinearArgs& args, const ParallelFor& parallel) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  Linear<W> product{static_cast<const W*>(args.weight),
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    args.in,
                    args.out,
                    args.rows,
                    args.scale};
  if constexpr (std::is_same_v<T, float>) {
    product.x = x;
    product.y = y;
    linear(product, parallel);
  } else {
    float* wide = args.workspace;
    float* sums = wide + args.rows * args.in;
    for (int64_t i = 0; i < args.rows * args.in; ++i) wide[i] = to_float(x[i]);
    product.x = wide;
    product.y = sums;
    linear(product, parallel);
    for (int64_t i = 0; i < args.rows * args.out; ++i) y[i] = from_float<T>(sums[i]);
  }
}

}  // namespace

void skinny_linear(const SkinnyLinearArgs& args, const ParallelFor& parallel) {
  with_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.scale == nullptr ? multiply<T, T>(args, parallel) : multiply<T, int8_t>(args, parallel);
  });
}

}  // namespace kelix::KELIX_ISA
