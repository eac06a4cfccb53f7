// The columns of largest variance, which the Gram form of covariance_loss treats apart: each
// column's rank, and copies of those that are high enough.

#pragma once

#include "stored.cuh"

namespace medmoco {

constexpr int kDirectColumns = 16;

struct RankArguments {
  Matrix features;
  int64_t samples, dims;
  const double *mean, *squares;  // of each column: see column_moments.cuh
  // Of each column: how many have a larger variance in float32, or the same and a lower number. NaN
  // is the largest.
  int* rank;
  double* direct;  // (samples, kDirectColumns) centred, by rank; zeros where there is no column
  // For the gradient, null: not wanted.
  float* direct_rounded;  // the same
  float* rest_variance;   // of each column, 0 for the direct ones
};

constexpr int kRankColumns = 32;  // of a block, one a lane
constexpr int kRankWarps = 8;     // which share the columns that those are compared with
constexpr int kRankThreads = kRankColumns * kRankWarps;
constexpr int kRankKeys = 1024;  // in shared memory at a time

// Orders as the squares do in float32, NaN last. A missing column comes before all others.
__device__ __forceinline__ int rank_key(const RankArguments& p, int64_t column) {
  if (column >= p.dims) return -1;
  const float squares = float(p.squares[column]);
  return squares != squares ? 0x7fffffff : int(bits_of(squares));
}

struct RankShared {
  __device__ static int* keys() { return reinterpret_cast<int*>(shared_memory()); }
  __device__ static int* counts() { return keys() + kRankKeys; }  // [warp][column]
  __device__ static int* ranks() { return counts() + kRankThreads; }
  static constexpr int kBytes = (kRankKeys + kRankThreads + kRankColumns) * int(sizeof(int));
};

// Of the keys in shared memory, from column `first` on, how many of this warp's share come before
// the key of this lane's column.
__device__ __forceinline__ int count_before(int key, int64_t first, int64_t first_column) {
  struct alignas(16) FourKeys {
    int keys[4];
  };
  const int warp = int(threadIdx.x) / kWarpLanes, lane = int(threadIdx.x) % kWarpLanes;
  int count = 0;
  for (int run = 0; run < kRankKeys; run += kRankColumns) {
    const auto* place = RankShared::keys() + run + 4 * warp;
    const FourKeys four = shared_load(reinterpret_cast<const FourKeys*>(place));
    if (first + run == first_column) {  // of equal ones the lower
#pragma unroll
      for (int e = 0; e < 4; ++e) count += four.keys[e] > key - (4 * warp + e < lane);
    } else {
      const int bound = key - (first + run < first_column);
#pragma unroll
      for (int e = 0; e < 4; ++e) count += four.keys[e] > bound;
    }
  }
  return count;
}

__device__ __forceinline__ void copy_direct(const RankArguments& p, int64_t column, int rank) {
  for (int64_t row = threadIdx.x; row < p.samples; row += kRankThreads) {
    const bool exists = column < p.dims;
    const double value = exists ? load(p.features, row, column) - p.mean[column] : 0;
    p.direct[row * kDirectColumns + rank] = value;
    if (p.direct_rounded) p.direct_rounded[row * kDirectColumns + rank] = float(value);
  }
}

static __global__ void __launch_bounds__(kRankThreads)
    covariance_loss_rank_kernel(RankArguments p) {
  const int warp = int(threadIdx.x) / kWarpLanes, lane = int(threadIdx.x) % kWarpLanes;
  const int64_t first_column = int64_t(blockIdx.x) * kRankColumns, column = first_column + lane;
  const int key = rank_key(p, column);
  int count = 0;
  for (int64_t first = 0; first < p.dims; first += kRankKeys) {
    block_barrier();  // nobody reads the keys before
    for (int i = int(threadIdx.x); i < kRankKeys; i += kRankThreads) {
      shared_store(RankShared::keys() + i, rank_key(p, first + i));
    }
    block_barrier();  // all keys are there
    count += count_before(key, first, first_column);
  }
  shared_store(RankShared::counts() + threadIdx.x, count);
  block_barrier();  // all counts are there
  if (warp == 0) {
    for (int other = 1; other < kRankWarps; ++other) {
      count += shared_load(RankShared::counts() + other * kRankColumns + lane);
    }
    shared_store(RankShared::ranks() + lane, count);
    if (column < p.dims) {
      p.rank[column] = count;
      const double variance = p.squares[column] / double(p.samples - 1);
      if (p.rest_variance) p.rest_variance[column] = count < kDirectColumns ? 0 : float(variance);
    }
  }
  block_barrier();  // all ranks are there
  for (int i = 0; i < kRankColumns; ++i) {
    const int rank = shared_load(RankShared::ranks() + i);
    if (rank < kDirectColumns) copy_direct(p, first_column + i, rank);
  }
}

inline void rank_columns(const RankArguments& p, Stream stream) {
  const unsigned blocks = unsigned((p.dims + kRankColumns - 1) / kRankColumns);
  launch("covariance_loss_rank", covariance_loss_rank_kernel, dim3(blocks), dim3(kRankThreads),
         RankShared::kBytes, stream, p);
}

}  // namespace medmoco
