// Operands of products that are centred while they are copied to shared memory, so that no centred
// copy of the features exists.
//
// A chunk of an operand goes through registers: its loads are under way while the chunk before is
// multiplied, then it is widened to float32, centred and stored.

#pragma once

#include "map_chunk.cuh"
#include "stored.cuh"

namespace medmoco {

// A batch of matrices. A column has a mean, which is taken off; a masked one reads as zeros.
struct CentredOperand {
  Matrix values;
  int64_t batch_stride;  // in elements, from matrix to matrix
  int64_t rows, columns;
  // Of each column, their sum; high null: not centred, low null: high is all.
  const float *mean_high, *mean_low;
  int64_t mean_batch_stride;
  const int* rank;  // of each column, for all matrices; below `least_rank` it is masked; null: none
  int least_rank;
  bool zero_diagonal;  // the elements (i, i) read as zeros

  // Whether any four elements of a row, from a multiple of four on, can be loaded together.
  __host__ __device__ bool in_fours() const {
    const int64_t strides = values.row_stride | batch_stride;
    const auto address = reinterpret_cast<uintptr_t>(values.data);
    return values.column_stride == 1 && strides % 4 == 0 &&
           address % (4 * bytes_of(values.storage)) == 0;
  }
};

// What the rows of an operand are in a product: its lines (rows of the left operand, columns of the
// right one), so that the depth runs along them, or its depth.
constexpr MapLayout kRowsAreLines = MapLayout::kChannelsLast;
constexpr MapLayout kRowsAreDepth = MapLayout::kChannelsFirst;

struct alignas(16) FourFloats {
  float values[4];
};
struct alignas(16) FourWords {
  uint32_t words[4];
};
struct alignas(8) TwoWords {
  uint32_t words[2];
};

// kLines lines and kChunkDepth<float> of depth, on their way to shared memory.
template <MapLayout kLayout, int kLines, int kThreads>
struct StagedChunk {
  using Chunk = MapChunk<float, kLayout, kLines>;
  using T = typename Chunk::T;
  static constexpr int kRowsAtOnce = kThreads / T::kRowChunks;
  static constexpr int kFours = kLines * kChunkDepth<float> / 4 / kThreads;
  static_assert(kThreads % T::kRowChunks == 0 && kFours * kThreads * 16 == Chunk::kBytes);

  uint32_t bits[kFours][4];  // of 16-bit elements two in a word
  int64_t first_row, first_column;

  // What a thread holds: of every kRowsAtOnce-th row four columns.
  struct Share {
    int row, column;
  };
  __device__ __forceinline__ static Share share() {
    const int thread = thread_id();
    return {thread / T::kRowChunks, thread % T::kRowChunks * 4};
  }

  // Starts to load matrix `batch` from a line and a depth on.
  __device__ __forceinline__ void load(const CentredOperand& operand, int64_t batch,
                                       int64_t first_line, int64_t first_depth) {
    first_row = kLayout == kRowsAreLines ? first_line : first_depth;
    first_column = kLayout == kRowsAreLines ? first_depth : first_line;
    const Matrix& m = operand.values;
    const int64_t r = first_row + share().row, c = first_column + share().column;
    const bool together = operand.in_fours() && c + 4 <= operand.columns;
    int64_t place = batch * operand.batch_stride + r * m.row_stride + c * m.column_stride;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (r + i * kRowsAtOnce < operand.rows) {
        if (together) {
          load_four(m, place, bits[i]);
        } else {
          load_each(m, place, operand.columns - c, bits[i]);
        }
      }
      place += kRowsAtOnce * m.row_stride;
    }
  }

  // Stores what has been loaded at an offset of the shared memory.
  __device__ __forceinline__ void store(const CentredOperand& operand, int64_t batch,
                                        int offset) const {
    const auto [row, column] = share();
    const int64_t c = first_column + column;
    FourFloats high{}, low{};
    bool absent[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      absent[e] = c + e >= operand.columns;
      if (absent[e]) continue;
      if (operand.rank) absent[e] = operand.rank[c + e] < operand.least_rank;
      if (operand.mean_high) {
        high.values[e] = operand.mean_high[batch * operand.mean_batch_stride + c + e];
        low.values[e] =
            !operand.mean_low ? 0 : operand.mean_low[batch * operand.mean_batch_stride + c + e];
      }
    }
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int64_t r = first_row + row + i * kRowsAtOnce;
      FourFloats four = widened(bits[i], operand.values.storage);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool zero = absent[e] || r >= operand.rows || (operand.zero_diagonal && r == c + e);
        const float centred = four.values[e] - high.values[e] - low.values[e];
        four.values[e] = zero ? 0 : centred;
      }
      unsigned char* to = shared_memory() + T{offset}.place(row + i * kRowsAtOnce, column / 4);
      shared_store(reinterpret_cast<FourFloats*>(to), four);
    }
  }

 private:
  static __device__ __forceinline__ void load_four(const Matrix& m, int64_t place,
                                                   uint32_t (&to)[4]) {
    const auto* from = static_cast<const unsigned char*>(m.data) + place * bytes_of(m.storage);
    if (m.storage == Storage::kFloat32) {
      const FourWords four = *reinterpret_cast<const FourWords*>(from);
#pragma unroll
      for (int w = 0; w < 4; ++w) to[w] = four.words[w];
    } else {
      const TwoWords two = *reinterpret_cast<const TwoWords*>(from);
      to[0] = two.words[0];
      to[1] = two.words[1];
    }
  }
  static __device__ __forceinline__ void load_each(const Matrix& m, int64_t place, int64_t left,
                                                   uint32_t (&to)[4]) {
    uint32_t each[4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < left) each[e] = load_bits(m.data, m.storage, place + e * m.column_stride);
    }
    const bool wide = m.storage == Storage::kFloat32;
    to[0] = wide ? each[0] : each[1] << 16 | each[0];
    to[1] = wide ? each[1] : each[3] << 16 | each[2];
    to[2] = each[2];
    to[3] = each[3];
  }
  static __device__ __forceinline__ FourFloats widened(const uint32_t (&bits)[4], Storage storage) {
    auto as = [&](Storage known) {  // to the compiler: so that it asks once for all four
      FourFloats four;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool wide = known == Storage::kFloat32;
        four.values[e] = value_of(wide ? bits[e] : bits[e / 2] >> (e % 2 * 16), known);
      }
      return four;
    };
    if (storage == Storage::kFloat32) return as(Storage::kFloat32);
    if (storage == Storage::kBFloat16) return as(Storage::kBFloat16);
    return as(Storage::kFloat16);
  }
};

}  // namespace medmoco
