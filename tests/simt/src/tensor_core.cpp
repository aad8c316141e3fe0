#include "simt/tensor_core.h"

#include "simt/numbers.h"
#include "simt/state.h"

namespace simt {
namespace {

float bf16_of(uint16_t bits) { return __bfloat162float({bits}); }
float f16_of(uint16_t bits) { return __half2float({bits}); }

// Element `index` of a pair.
template <float (*kWiden)(uint16_t)>
float element(uint32_t pair, int index) {
  return kWiden(static_cast<uint16_t>(index != 0 ? pair >> 16 : pair & 0xffffu));
}

template <float (*kWiden)(uint16_t)>
void multiply(float (&d)[4], const Exchange& operands) {
  const int lane = current->lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;  // of element k in its row of A or column of B
      const auto a = operands.asked<MmaOperands>(row % 8 * 4 + owner);
      const auto b = operands.asked<MmaOperands>(column * 4 + owner);
      sum += element<kWiden>(a.a[row / 8 + k / 8 * 2], k % 2) * element<kWiden>(b.b[k / 8], k % 2);
    }
    d[i] += sum;
  }
}

}  // namespace

__attribute__((noinline)) void check_row_address(const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail({"ldmatrix", __builtin_return_address(0)}, "misaligned row address");
  }
}

void load_matrices(uint32_t (&registers)[4], const Exchange& rows, bool transposed) {
  const int lane = current->lane();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
      const int major = lane / 4;
      const int minor = lane % 4 * 2 + i;
      const int row = transposed ? minor : major;
      const int column = transposed ? major : minor;
      const auto* source = rows.asked<const uint16_t*>(matrix * 8 + row);
      pair |= static_cast<uint32_t>(source[column]) << (16 * i);
    }
    registers[matrix] = pair;
  }
}

void multiply_bf16(float (&d)[4], const Exchange& operands) { multiply<bf16_of>(d, operands); }
void multiply_f16(float (&d)[4], const Exchange& operands) { multiply<f16_of>(d, operands); }

}  // namespace simt
