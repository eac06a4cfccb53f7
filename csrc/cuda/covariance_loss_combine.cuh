// Puts the parts of covariance_loss together: the matrix, sums of its squares, and the loss.

#pragma once

#include "centred_moment.cuh"
#include "covariance_loss_direct.cuh"

namespace medmoco {

struct CovarianceCombineArguments {
  MomentParts parts;
  int64_t side, squares;  // of the matrix; of kSquareSide in it
  bool with_diagonal;     // in the sums: where it is not, subtracting it would cost digits
  double scale;
  float* matrix;           // (side, side)
  double* sums;            // of the squares of the elements of each square and its mirror image
  DirectArguments direct;  // of blocks beyond the squares
};

constexpr int kSquareSide = 32;
constexpr int kSquareRows = 4;  // of a thread
constexpr int kCombineThreads = kDirectThreads;
constexpr int kSquareStride = kSquareSide + 1;  // so that rows and columns lie in different banks
static_assert(kSquareSide * kSquareSide == kSquareRows * kCombineThreads);

struct SquareShared {
  __device__ static double* sums() { return reinterpret_cast<double*>(shared_memory()); }
  static constexpr int kSumBytes = block_sum_bytes(kCombineThreads);
  __device__ static float* values() {
    return reinterpret_cast<float*>(shared_memory() + kSumBytes);
  }
  static constexpr int kBytes = kSumBytes + kSquareSide * kSquareStride * int(sizeof(float));
};
static_assert(SquareShared::kBytes <= DirectShared::kBytes);

// Of each thread's elements, column threadIdx.x % kSquareSide and rows a warp apart, the sum of
// their parts.
__device__ __forceinline__ void add_parts(const MomentParts& parts, int tile, int row, int column,
                                          double (&sums)[kSquareRows]) {
  const int side = parts.tiles.side;
  const int last = parts.schedule.last_block(tile);
#pragma unroll 2
  for (int block = parts.schedule.first_block(tile); block <= last; ++block) {
    const float* from = parts.data + parts.part(block, tile) + row * side + column;
#pragma unroll
    for (int i = 0; i < kSquareRows; ++i) {
      sums[i] += from[i * (kSquareSide / kSquareRows) * side];
    }
  }
}

__device__ __forceinline__ void combine_square(const CovarianceCombineArguments& p, int square) {
  constexpr int kRowStep = kSquareSide / kSquareRows;
  const int squares_of_side = p.parts.tiles.side / kSquareSide;
  const int tile = square / (squares_of_side * squares_of_side);
  const auto place = p.parts.tiles.place(tile);
  const int in_tile_row = square / squares_of_side % squares_of_side * kSquareSide;
  const int in_tile_column = square % squares_of_side * kSquareSide;
  const int64_t first_row = int64_t(place.row) * p.parts.tiles.side + in_tile_row;
  const int64_t first_column = int64_t(place.column) * p.parts.tiles.side + in_tile_column;
  const int thread_row = int(threadIdx.x) / kSquareSide, lane = int(threadIdx.x) % kSquareSide;
  double sum = 0;
  if (first_row >= first_column && first_row < p.side) {  // the same for all threads
    double values[kSquareRows] = {};
    add_parts(p.parts, tile, in_tile_row + thread_row, in_tile_column + lane, values);
#pragma unroll
    for (int i = 0; i < kSquareRows; ++i) {
      const int row = thread_row + i * kRowStep;
      const int64_t r = first_row + row, c = first_column + lane;
      const float value = float(values[i] * p.scale);
      shared_store(SquareShared::values() + row * kSquareStride + lane, value);
      if (r >= p.side || r < c) continue;
      p.matrix[r * p.side + c] = value;
      const double squared = double(value) * value;
      sum += r > c ? 2 * squared : p.with_diagonal ? squared : 0;
    }
    block_barrier();  // all values are there
#pragma unroll
    for (int i = 0; i < kSquareRows; ++i) {
      const int row = thread_row + i * kRowStep;
      const int64_t r = first_column + row, c = first_row + lane;
      if (c >= p.side || c <= r) continue;
      p.matrix[r * p.side + c] = shared_load(SquareShared::values() + lane * kSquareStride + row);
    }
  }
  const double total = block_sum<kCombineThreads>(sum, SquareShared::sums());
  if (threadIdx.x == 0) p.sums[square] = total;
}

// A square of the matrix or a panel of the direct rows.
static __global__ void __launch_bounds__(kCombineThreads)
    covariance_loss_combine_kernel(CovarianceCombineArguments p) {
  const int64_t block = blockIdx.x;
  if (block < p.squares) {
    combine_square(p, int(block));
  } else {
    direct_panel(p.direct, block - p.squares);
  }
}

inline int64_t squares_of(const MomentTiles& tiles) {
  const int64_t squares_of_side = tiles.side / kSquareSide;
  return tiles.of_each() * squares_of_side * squares_of_side;
}

// `panels`: of direct rows.
inline void combine_covariance(const CovarianceCombineArguments& p, int64_t panels, Stream stream) {
  launch("covariance_loss_combine", covariance_loss_combine_kernel,
         dim3(unsigned(p.squares + panels)), dim3(kCombineThreads),
         panels > 0 ? DirectShared::kBytes : SquareShared::kBytes, stream, p);
}

struct CovarianceSumArguments {
  int64_t samples, dims, squares, panels;
  const double* square_sums;
  // Of the Gram form, which has panels.
  const double* direct_sums;
  const double* column_squares;
  const int* rank;
  float* loss;
};

constexpr int kLossThreads = 512;

static __global__ void __launch_bounds__(kLossThreads)
    covariance_loss_sum_kernel(CovarianceSumArguments p) {
  double* shared = reinterpret_cast<double*>(shared_memory());
  double rest = 0, direct = 0;
  for (int64_t i = threadIdx.x; i < p.squares; i += kLossThreads) rest += p.square_sums[i];
  for (int64_t i = threadIdx.x; i < p.panels; i += kLossThreads) direct += p.direct_sums[i];
  // The Gram matrix's squares are those of the covariance with its diagonal.
  for (int64_t c = threadIdx.x; p.panels > 0 && c < p.dims; c += kLossThreads) {
    const double variance = p.column_squares[c] / double(p.samples - 1);
    if (p.rank[c] >= kDirectColumns) rest -= variance * variance;
  }
  rest = block_sum<kLossThreads>(rest, shared);
  direct = block_sum<kLossThreads>(direct, shared);
  if (threadIdx.x > 0) return;
  const double bounded = rest < 0 ? 0 : rest;  // by rounding; NaN stays
  *p.loss = float((bounded + direct) / double(p.dims));
}

inline void sum_covariance_loss(const CovarianceSumArguments& p, Stream stream) {
  launch("covariance_loss_sum", covariance_loss_sum_kernel, dim3(1), dim3(kLossThreads),
         block_sum_bytes(kLossThreads), stream, p);
}

}  // namespace medmoco
