// What the tensor cores compute, once the operands of a warp's 32 lanes are there.
//
// Operands have been rounded to their format. Their products and the sum of these with what was
// gathered are exact (to float64); then the sum is truncated to float32, towards zero, as
// tensor cores do (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021): long
// sums drift here too. A GPU truncates the terms besides, to a few bits below the largest one, and
// how many is up to its generation: so its results differ in the last places.

#pragma once

#include <bit>
#include <cmath>
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

inline float truncate_to_float32(double value) {
  const float nearest = static_cast<float>(value);
  if (!(std::abs(static_cast<double>(nearest)) > std::abs(value)) || std::isinf(nearest)) {
    return nearest;
  }
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1);
}

// sum (16 x 8) += a (16 x depth) b (depth x 8), the operands spread over the lanes as mma.cuh says.
// The hottest loop of all, over local arrays: without sanitizers it takes a third of the time.
template <typename Scalar>
__attribute__((no_sanitize("address", "undefined"))) void multiply_add(
    MmaOperands* const (&lanes)[32]) {
  typedef double Pair __attribute__((vector_size(16)));
  constexpr int kElements = Fragment<Scalar>::kElements, kChunk = 4 * kElements;
  constexpr int kDepth = 2 * kChunk;
  double a[16][kDepth], b[kDepth][8];
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
    for (int column = 0; column < 8; column += 2) {
      float* held = lanes[row % 8 * 4 + column / 2]->sum + row / 8 * 2;
      Pair sum = {held[0], held[1]};
      for (int depth = 0; depth < kDepth; ++depth) {
        sum += a[row][depth] * Pair{b[depth][column], b[depth][column + 1]};
      }
      held[0] = truncate_to_float32(sum[0]);
      held[1] = truncate_to_float32(sum[1]);
    }
  }
}

}  // namespace medmoco::emulator
