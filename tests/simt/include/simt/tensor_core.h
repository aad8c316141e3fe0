// ldmatrix and mma.m16n8k16 with the fragment layouts of the PTX manual.
#pragma once

#include <bit>
#include <cstdint>

#include "simt/numbers.h"
#include "simt/sync.h"

namespace simt {

// Lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits). Register i
// gets two neighbours of matrix i: row l / 4, columns 2 (l % 4) and the next; of its transpose with
// `transposed`.
void load_matrices(uint32_t (&registers)[4], const Exchange& rows, bool transposed);

struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
};

// d += A B, A 16 x 16 by rows, B 16 x 8 by columns, bf16 or fp16 in, fp32 sums.
void multiply_bf16(float (&d)[4], const Exchange& operands);
void multiply_f16(float (&d)[4], const Exchange& operands);

void check_row_address(const void* row);

}  // namespace simt

namespace kelix {

__attribute__((always_inline)) inline void load_matrix_x4(uint32_t (&registers)[4],
                                                          const void* row) {
  simt::check_row_address(row);
  simt::load_matrices(registers, simt::exchange("ldmatrix", 0xffffffffu, row), false);
  simt::exchange("ldmatrix", 0xffffffffu, 0);  // nobody overwrites what others still read
}

__attribute__((always_inline)) inline void load_matrix_x4_transposed(uint32_t (&registers)[4],
                                                                     const void* row) {
  simt::check_row_address(row);
  simt::load_matrices(registers, simt::exchange("ldmatrix.trans", 0xffffffffu, row), true);
  simt::exchange("ldmatrix.trans", 0xffffffffu, 0);
}

__attribute__((always_inline)) inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  const simt::MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::multiply_bf16(d, simt::exchange("mma", 0xffffffffu, mine));
}

__attribute__((always_inline)) inline void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  const simt::MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::multiply_f16(d, simt::exchange("mma", 0xffffffffu, mine));
}

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | static_cast<uint32_t>(__float2bfloat16_rn(high).bits)
                                             << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return __float2half_rn(low).bits | static_cast<uint32_t>(__float2half_rn(high).bits) << 16;
}
inline uint32_t multiply_f16_pair(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t bits) {
    return __half2float(__half{static_cast<uint16_t>(bits)});
  };
  return pack_f16(half(a) * half(b), half(a >> 16) * half(b >> 16));
}

}  // namespace kelix
