// What the tensor cores compute, once the operands of a warp's 32 lanes are there.
//
// Operands have been rounded to their format, so a product of two is exact in float32 (short of
// overflow). Products are added to the sum one by one, depth 0 first, each addition rounded to
// nearest float32. A GPU adds those of one instruction together and truncates: its result differs
// by a few units in the last place of the largest term, from one generation to the next too.

#pragma once

#include <cstdint>

#include "number_formats.h"

namespace medmoco::emulator {

struct MmaOperands {
  float* sum;         // 4
  const uint32_t* a;  // 4
  uint32_t b[2];
};

// Element `index` of a 32-bit register of a fragment.
template <typename Scalar>
struct Fragment {
  static constexpr int kElements = 2;
  static float element(uint32_t bits, int index) {
    return to_float(Scalar{static_cast<uint16_t>(bits >> 16 * index)});
  }
};
struct TF32;
template <>
struct Fragment<TF32> {
  static constexpr int kElements = 1;
  static float element(uint32_t bits, int) { return truncate_to_tf32(bits); }
};

// sum (16 x 8) += a (16 x depth) b (depth x 8), the operands spread over the lanes as mma.cuh says.
template <typename Scalar>
void multiply_add(MmaOperands* const (&lanes)[32]) {
  typedef float Quad __attribute__((vector_size(16)));
  constexpr int kElements = Fragment<Scalar>::kElements, kChunk = 4 * kElements;
  constexpr int kDepth = 2 * kChunk;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& held = *lanes[lane];
    const int group = lane / 4, first = lane % 4 * kElements;
    for (int i = 0; i < kElements; ++i) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int depth = chunk * kChunk + first + i;
        a[group][depth] = Fragment<Scalar>::element(held.a[2 * chunk], i);
        a[group + 8][depth] = Fragment<Scalar>::element(held.a[2 * chunk + 1], i);
        b[depth][group] = Fragment<Scalar>::element(held.b[chunk], i);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    Quad sums[2];
    const auto held = [&](int column) -> float& {
      return lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2];
    };
    for (int column = 0; column < 8; ++column) sums[column / 4][column % 4] = held(column);
    for (int depth = 0; depth < kDepth; ++depth) {
      for (int half = 0; half < 2; ++half) {
        const float* from = b[depth] + 4 * half;
        sums[half] += a[row][depth] * Quad{from[0], from[1], from[2], from[3]};
      }
    }
    for (int column = 0; column < 8; ++column) held(column) = sums[column / 4][column % 4];
  }
}

}  // namespace medmoco::emulator
