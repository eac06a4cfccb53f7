// Rows of the covariance that belong to the columns of largest variance, in double: where those
// hold nearly all of the variance, the covariance among them is nearly all of the loss, and may be
// small beside the terms of its sum.

#pragma once

#include "block_sum.cuh"
#include "covariance_loss_rank.cuh"

namespace medmoco {

struct DirectArguments {
  Matrix features;
  int64_t samples, dims;
  const double* mean;    // of each column
  const int* rank;       // likewise
  const double* direct;  // (samples, kDirectColumns)
  float* rows;           // (kDirectColumns, dims) with zeros for the variances; null: not wanted
  double* sums;          // of a panel's squares: see direct_panel; null: not wanted
};

constexpr int kDirectPanel = 32;  // columns of a block, one a lane
constexpr int kDirectSlots = 8;   // warps that share the rows
constexpr int kDirectThreads = kDirectPanel * kDirectSlots;

struct DirectShared {
  // [slot][rank][column]
  __device__ static double* products() { return reinterpret_cast<double*>(shared_memory()); }
  static constexpr int kProducts = kDirectSlots * kDirectColumns * kDirectPanel;
  __device__ static double* squares() { return products() + kProducts; }
  static constexpr int kBytes = kProducts * int(sizeof(double)) + block_sum_bytes(kDirectThreads);
};

__host__ __device__ __forceinline__ int64_t direct_panels(int64_t dims) {
  return (dims + kDirectPanel - 1) / kDirectPanel;
}

// products[rank] = direct column . this lane's column, over the rows of this warp.
__device__ __forceinline__ void multiply_direct(const DirectArguments& p, int64_t column, int slot,
                                                double (&products)[kDirectColumns]) {
  struct alignas(16) TwoDoubles {
    double values[2];
  };
  const double mean = p.mean[column];
#pragma unroll 2
  for (int64_t row = slot; row < p.samples; row += kDirectSlots) {
    const double value = load(p.features, row, column) - mean;
    const auto* direct = reinterpret_cast<const TwoDoubles*>(p.direct + row * kDirectColumns);
#pragma unroll
    for (int i = 0; i < kDirectColumns / 2; ++i) {
      const TwoDoubles two = direct[i];
      products[2 * i] += two.values[0] * value;
      products[2 * i + 1] += two.values[1] * value;
    }
  }
}

// The direct rows in a panel of columns; the sum of squares is that of these and of their mirror
// images, the diagonal left out.
__device__ __forceinline__ void direct_panel(const DirectArguments& p, int64_t panel) {
  const int slot = int(threadIdx.x) / kDirectPanel, lane = int(threadIdx.x) % kDirectPanel;
  const int64_t column = panel * kDirectPanel + lane;
  const bool exists = column < p.dims;
  double products[kDirectColumns] = {};
  if (exists) multiply_direct(p, column, slot, products);
#pragma unroll
  for (int i = 0; i < kDirectColumns; ++i) {
    shared_store(DirectShared::products() + (slot * kDirectColumns + i) * kDirectPanel + lane,
                 products[i]);
  }
  block_barrier();  // the products of all slots are there
  double squares = 0;
  const int rank = exists ? p.rank[column] : 0;
  for (int i = slot; exists && i < kDirectColumns; i += kDirectSlots) {
    double covariance = 0;
    for (int other = 0; other < kDirectSlots; ++other) {
      covariance += shared_load(DirectShared::products() +
                                (other * kDirectColumns + i) * kDirectPanel + lane);
    }
    covariance = rank == i ? 0 : covariance / double(p.samples - 1);
    if (p.rows) p.rows[i * p.dims + column] = float(covariance);
    // What lies outside the direct columns has its mirror image outside the direct rows.
    squares += (rank < kDirectColumns ? 1 : 2) * covariance * covariance;
  }
  if (!p.sums) return;
  const double sum = block_sum<kDirectThreads>(squares, DirectShared::squares());
  if (threadIdx.x == 0) p.sums[panel] = sum;
}

}  // namespace medmoco
