// Products of operands that lie in shared memory, results in registers.

#pragma once

#include "tile.cuh"

namespace medmoco {

// Calls visit(m, n, i, line) for every value of a lane: at [m][n][i], of the query `line`.
template <int kLeftTiles, int kRightTiles, typename Visit>
__device__ __forceinline__ void for_each_value(Visit visit) {
#pragma unroll
  for (int m = 0; m < kLeftTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kRightTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) visit(m, n, i, 2 * m + i / 2);
    }
  }
}

// sums (left tile, right tile) += left operands . right operands, over kSteps steps of depth.
template <typename Kind, int kSteps, int kLeftTiles, int kRightTiles, typename LoadLeft,
          typename LoadRight>
__device__ __forceinline__ void multiply_add(float (&sums)[kLeftTiles][kRightTiles][4],
                                             LoadLeft load_left, LoadRight load_right) {
  constexpr int kRun =
      Kind::kPrecise ? 2 : 4;  // steps in a row that tensor cores sum up where sums must be
                               // rounded; unrolled further, the compiler runs out of registers
#pragma unroll 1
  for (int start = 0; start < kSteps; start += kRun) {
    float run[kLeftTiles][kRightTiles][4] = {};
    auto& target = Kind::kPrecise ? run : sums;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int step = start + i;
      typename Kind::A left[kLeftTiles];
      uint32_t raw[4];
#pragma unroll
      for (int m = 0; m < kLeftTiles; ++m) {
        load_left(raw, m, step);
        left[m] = Kind::left(raw);
      }
#pragma unroll
      for (int n = 0; n < kRightTiles; n += 2) {
        load_right(raw, n, step);
        const auto near = Kind::right(raw[0], raw[1]), far = Kind::right(raw[2], raw[3]);
#pragma unroll
        for (int m = 0; m < kLeftTiles; ++m) {
          Kind::multiply_add(target[m][n], left[m], near);
          Kind::multiply_add(target[m][n + 1], left[m], far);
        }
      }
    }
    if constexpr (Kind::kPrecise) {
      for_each_value<kLeftTiles, kRightTiles>(
          [&](int m, int n, int i, int) { sums[m][n][i] += run[m][n][i]; });
    }
  }
}

// The same, from zero.
template <typename Kind, int kSteps, int kLeftTiles, int kRightTiles, typename LoadLeft,
          typename LoadRight>
__device__ __forceinline__ void multiply(float (&sums)[kLeftTiles][kRightTiles][4],
                                         LoadLeft load_left, LoadRight load_right) {
  for_each_value<kLeftTiles, kRightTiles>([&](int m, int n, int i, int) { sums[m][n][i] = 0; });
  multiply_add<Kind, kSteps>(sums, load_left, load_right);
}

}  // namespace medmoco
