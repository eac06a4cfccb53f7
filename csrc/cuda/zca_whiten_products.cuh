// Products of small square matrices by one block of threads, in float32.

#pragma once

#include "primitives.cuh"

namespace medmoco {

// Of a block that works on the matrices of one group. Its kernels say that one block at a time is
// enough for a multiprocessor: for two the compiler would spill registers.
constexpr int kWhitenThreads = 512;

// use(i, j, sum over k of left(i, k) right(k, j)). A thread's elements lie 32 rows and 16 columns
// apart, so that neighbouring threads read neighbouring columns.
template <int kRows, int kColumns, typename Left, typename Right, typename Use>
__device__ __forceinline__ void multiply_tiles(int size, Left left, Right right, Use use) {
  constexpr int kColumnsAtOnce = 16, kRowsAtOnce = kWhitenThreads / kColumnsAtOnce;
  const int row = thread_id() / kColumnsAtOnce, column = thread_id() % kColumnsAtOnce;
  auto bounded = [&](int index) { return index < size ? index : size - 1; };
  float sums[kRows][kColumns] = {};
#pragma unroll 2
  for (int k = 0; k < size; ++k) {
    float a[kRows], b[kColumns];
#pragma unroll
    for (int r = 0; r < kRows; ++r) a[r] = left(bounded(row + r * kRowsAtOnce), k);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) b[c] = right(k, bounded(column + c * kColumnsAtOnce));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(a[r], b[c], sums[r][c]);
    }
  }
  block_barrier();  // all have read the operands, one of which the result may replace
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int i = row + r * kRowsAtOnce, j = column + c * kColumnsAtOnce;
      if (i < size && j < size) use(i, j, sums[r][c]);
    }
  }
  block_barrier();  // the result is there
}

// The same with the smallest tiles that hold matrices of `size`, at most 128. All threads of the
// block call it.
template <typename Left, typename Right, typename Use>
__device__ __forceinline__ void multiply_square(int size, Left left, Right right, Use use) {
  if (size <= 64) {
    multiply_tiles<2, 4>(size, left, right, use);
  } else {
    multiply_tiles<4, 8>(size, left, right, use);
  }
}

}  // namespace medmoco
