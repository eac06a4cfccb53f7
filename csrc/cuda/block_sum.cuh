// Sums over the threads of a block, in double and in an order that never changes.

#pragma once

#include "primitives.cuh"

namespace medmoco {

constexpr int kSumGroup = 16;  // threads whose values one thread adds up

// Of shared memory.
constexpr int block_sum_bytes(int threads) {
  return (threads + threads / kSumGroup) * int(sizeof(double));
}

// The sum of all threads' values, which thread 0 gets; kThreads of them call it. `values` lies in
// shared memory, which nobody else uses meanwhile; the next sum there may follow at once.
template <int kThreads>
__device__ __forceinline__ double block_sum(double value, double* values) {
  static_assert(kThreads % kSumGroup == 0);
  constexpr int kGroups = kThreads / kSumGroup;
  const int thread = int(threadIdx.x);
  double* groups = values + kThreads;
  auto add = [](const double* from, int count, int step) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += shared_load(from + i * step);
    return sum;
  };
  shared_store(values + thread, value);
  block_barrier();  // all values are there
  if (thread < kGroups) shared_store(groups + thread, add(values + thread, kSumGroup, kGroups));
  block_barrier();  // so are the sums of all groups
  return thread == 0 ? add(groups, kGroups, 1) : 0;
}

}  // namespace medmoco
