// Mean of each column of a matrix and sum of its squared deviations, in double.
//
// Values count from the first of their column on. Far from zero that keeps the digits, and the
// squares lose no more than the column's length: the first value's deviation is one of theirs.

#pragma once

#include <algorithm>

#include "stored.cuh"

namespace medmoco {

// Of each column; null: not wanted.
struct Moments {
  double* mean;
  float *mean_high, *mean_low;  // whose sum is the mean: value - high - low loses nothing
  double* squares;              // sum of the squared deviations from the mean
};

constexpr int kMomentColumns = 32;  // of a block
constexpr int kMomentSlots = 16;    // threads that share the rows of a column
constexpr int kMomentThreads = kMomentColumns * kMomentSlots;

struct alignas(16) MomentSums {
  double values, squares;  // counted from the first value

  __device__ void add(const MomentSums& other) {
    values += other.values;
    squares += other.squares;
  }
};

struct ColumnMomentArguments {
  Matrix values;
  int64_t rows, columns, slices, slice_rows;
  bool along_rows;    // a warp reads: the values that lie next to each other
  MomentSums* parts;  // [slice][column], where there are several slices
  Moments out;
};

// The column of the block and the slot of this thread. The sums of a slot are the same either way.
struct MomentPlace {
  int column, slot;

  __device__ static MomentPlace of(bool along_rows) {
    const int thread = int(threadIdx.x);
    if (along_rows) return {thread / kMomentSlots, thread % kMomentSlots};
    return {thread % kMomentColumns, thread / kMomentColumns};
  }
};

__device__ __forceinline__ MomentSums sum_of_slot(const ColumnMomentArguments& p, int64_t column,
                                                  int64_t slot_row, int64_t end) {
  constexpr int kAtOnce = 8;  // whose loads are under way together
  const double first = load(p.values, 0, column);
  MomentSums sums{0, 0};
  for (int64_t start = slot_row; start < end; start += kAtOnce * kMomentSlots) {
    float values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t row = start + i * kMomentSlots;
      values[i] = load(p.values, row < end ? row : 0, column);  // beyond, what adds nothing
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const double value = values[i] - first;
      sums.values += value;
      sums.squares += value * value;
    }
  }
  return sums;
}

__device__ __forceinline__ void write_moments(const ColumnMomentArguments& p, int64_t column,
                                              const MomentSums& sums) {
  const double count = double(p.rows);
  const double mean = load(p.values, 0, column) + sums.values / count;
  const float high = float(mean);
  const double squares = sums.squares - sums.values * sums.values / count;
  if (p.out.mean) p.out.mean[column] = mean;
  if (p.out.mean_high) p.out.mean_high[column] = high;
  if (p.out.mean_low) p.out.mean_low[column] = float(mean - high);
  if (p.out.squares) p.out.squares[column] = squares < 0 ? 0 : squares;  // by rounding; NaN stays
}

// Calls use(column, sums) once for each column of the block, with the sums of its slots.
template <typename Use>
__device__ __forceinline__ void add_slots(const ColumnMomentArguments& p, const MomentPlace& place,
                                          const MomentSums& sums, Use use) {
  auto* slots = reinterpret_cast<MomentSums*>(shared_memory());  // [slot][column]
  shared_store(slots + place.slot * kMomentColumns + place.column, sums);
  block_barrier();  // all slots are there
  const int64_t column = int64_t(blockIdx.x) * kMomentColumns + threadIdx.x;
  if (threadIdx.x >= kMomentColumns || column >= p.columns) return;
  MomentSums total = shared_load(slots + threadIdx.x);
  for (int slot = 1; slot < kMomentSlots; ++slot) {
    total.add(shared_load(slots + slot * kMomentColumns + threadIdx.x));
  }
  use(column, total);
}

// A block sums a slice of the rows.
static __global__ void __launch_bounds__(kMomentThreads)
    column_moments_kernel(ColumnMomentArguments p) {
  const auto place = MomentPlace::of(p.along_rows);
  const int64_t column = int64_t(blockIdx.x) * kMomentColumns + place.column;
  const int64_t first = blockIdx.y * p.slice_rows;
  const int64_t end = first + p.slice_rows < p.rows ? first + p.slice_rows : p.rows;
  MomentSums sums{0, 0};
  if (column < p.columns) sums = sum_of_slot(p, column, first + place.slot, end);
  add_slots(p, place, sums, [&](int64_t whose, const MomentSums& total) {
    if (p.parts) {
      p.parts[blockIdx.y * p.columns + whose] = total;
    } else {
      write_moments(p, whose, total);
    }
  });
}

// Adds up the slices.
static __global__ void __launch_bounds__(kMomentThreads)
    column_moments_combine_kernel(ColumnMomentArguments p) {
  const auto place = MomentPlace::of(false);
  const int64_t column = int64_t(blockIdx.x) * kMomentColumns + place.column;
  MomentSums sums{0, 0};
  if (column < p.columns) {
    for (int64_t slice = place.slot; slice < p.slices; slice += kMomentSlots) {
      sums.add(p.parts[slice * p.columns + column]);
    }
  }
  add_slots(p, place, sums,
            [&](int64_t whose, const MomentSums& total) { write_moments(p, whose, total); });
}

inline int64_t moment_blocks(int64_t columns) {
  return (columns + kMomentColumns - 1) / kMomentColumns;
}

// As many as fill the GPU, but none so short that adding them up takes longer.
inline int64_t moment_slices(int64_t rows, int64_t columns, int multiprocessors) {
  constexpr int64_t kLeastRows = 512, kBlocksPerMultiprocessor = 2;
  const int64_t blocks = std::max<int64_t>(moment_blocks(columns), 1);
  const int64_t filling = multiprocessors * kBlocksPerMultiprocessor / blocks;
  return std::max<int64_t>(std::min(filling, rows / kLeastRows), 1);
}

inline int64_t column_moments_bytes(int64_t rows, int64_t columns, int multiprocessors) {
  const int64_t slices = moment_slices(rows, columns, multiprocessors);
  return slices > 1 ? slices * columns * int64_t(sizeof(MomentSums)) : 0;
}

// On `stream`. There must be a row; without columns nothing is launched. The workspace, of as many
// bytes as said above, is aligned to 16. NaN and infinity stay in their column.
inline void column_moments(const Matrix& values, int64_t rows, int64_t columns, const Moments& out,
                           void* workspace, int multiprocessors, Stream stream) {
  ColumnMomentArguments a{};
  a.values = values;
  a.rows = rows;
  a.columns = columns;
  a.slices = moment_slices(rows, columns, multiprocessors);
  a.slice_rows = (rows + a.slices - 1) / a.slices;
  a.along_rows = values.row_stride < values.column_stride;
  a.parts = a.slices > 1 ? static_cast<MomentSums*>(workspace) : nullptr;
  a.out = out;
  const unsigned blocks = unsigned(moment_blocks(columns));
  constexpr int kSharedBytes = kMomentThreads * int(sizeof(MomentSums));
  launch("column_moments", column_moments_kernel, dim3(blocks, unsigned(a.slices)),
         dim3(kMomentThreads), kSharedBytes, stream, a);
  if (a.slices == 1) return;
  launch("column_moments_combine", column_moments_combine_kernel, dim3(blocks),
         dim3(kMomentThreads), kSharedBytes, stream, a);
}

}  // namespace medmoco
