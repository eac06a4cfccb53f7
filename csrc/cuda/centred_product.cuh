// Products of centred operands on the tensor cores. Two kernels: `moment`, few results from a long
// depth, which is therefore shared out over blocks; and `apply`, a result for each feature, each
// block a tile of them.
//
// Arithmetic is that of Kind, Tf32x3 or Tf32, whatever the operands are stored as.

#pragma once

#include "centred_operand.cuh"
#include "products.cuh"
#include "schedule.cuh"

namespace medmoco {

// Two warps by the rows of a tile, and as many by its columns as there are. A large tile loads each
// operand half as often, a small one keeps more multiprocessors busy.
template <typename Kind_, bool kLarge>
struct ProductSizes {
  using Kind = Kind_;
  static constexpr int kSide = kLarge ? 128 : 64;
  static constexpr int kThreads = kLarge ? 256 : 128;
  static constexpr int kBlocksPerMultiprocessor = kLarge ? 1 : 3;
  static constexpr int kLeftTiles = kLarge ? 4 : 2, kRightTiles = 4;
  static constexpr int kWarpRows = 16 * kLeftTiles, kWarpColumns = 8 * kRightTiles;
  static constexpr int kWarpsByColumns = kSide / kWarpColumns;
  static constexpr int kOperandBytes = kSide * kChunkDepthBytes;
  static constexpr int kSharedBytes = 4 * kOperandBytes;  // two chunks of each side
  static_assert(2 * kWarpRows == kSide && 2 * kWarpsByColumns * kWarpLanes == kThreads);
};

constexpr int kProductDepth = kChunkDepth<float>;

__host__ __device__ __forceinline__ int64_t product_chunks(int64_t depth) {
  return (depth + kProductDepth - 1) / kProductDepth;
}

// left . right, summed over the depth.
struct Term {
  CentredOperand left, right;
  int64_t depth;
};

template <typename S>
using ProductSums = float[S::kLeftTiles][S::kRightTiles][4];

// The row and the column, in its tile, of a lane's value [m][n][i].
template <typename S>
struct PlaceInTile {
  int row, column;

  __device__ __forceinline__ static PlaceInTile of(int m, int n, int i) {
    const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
    return {warp / S::kWarpsByColumns * S::kWarpRows + 16 * m + i / 2 * 8 + lane / 4,
            warp % S::kWarpsByColumns * S::kWarpColumns + 8 * n + lane % 4 * 2 + i % 2};
  }
};

// Multiplies tiles, one after the other, chunk by chunk of the depth.
template <typename S, MapLayout kLeft, MapLayout kRight>
struct TileProduct {
  using Left = StagedChunk<kLeft, S::kSide, S::kThreads>;
  using Right = StagedChunk<kRight, S::kSide, S::kThreads>;

  int slot = 0;  // of the next chunk, in shared memory

  static __device__ __forceinline__ int left_chunk(int slot) { return slot * S::kOperandBytes; }
  static __device__ __forceinline__ int right_chunk(int slot) {
    return (2 + slot) * S::kOperandBytes;
  }

  __device__ __forceinline__ void multiply_chunk(ProductSums<S>& sums) const {
    const int warp = thread_id() / kWarpLanes;
    const typename Left::Chunk::Reader left(left_chunk(slot),
                                            warp / S::kWarpsByColumns * S::kWarpRows, {});
    const typename Right::Chunk::Reader right(right_chunk(slot),
                                              warp % S::kWarpsByColumns * S::kWarpColumns, {});
    multiply_add<typename S::Kind, kChunkSteps>(
        sums, [&](uint32_t (&raw)[4], int m, int step) { left.left(raw, m, step); },
        [&](uint32_t (&raw)[4], int n, int step) { right.right(raw, n, step); });
  }

  // Adds the chunks [first, end) of a term to sums, for the lines of a tile.
  __device__ __forceinline__ void add(ProductSums<S>& sums, const Term& term, int64_t batch,
                                      int64_t first_row, int64_t first_column, int first, int end) {
    Left left;
    Right right;
    auto load = [&](int chunk) {
      left.load(term.left, batch, first_row, int64_t(chunk) * kProductDepth);
      right.load(term.right, batch, first_column, int64_t(chunk) * kProductDepth);
    };
    auto store = [&](int to) {
      left.store(term.left, batch, left_chunk(to));
      right.store(term.right, batch, right_chunk(to));
    };
    if (first < end) {
      load(first);
      store(slot);  // all have read what was there: see the barrier
    }
#pragma unroll 1
    for (int chunk = first; chunk < end; ++chunk) {
      if (chunk + 1 < end) load(chunk + 1);
      block_barrier();  // this chunk is there, and nobody reads the one before
      multiply_chunk(sums);
      slot ^= 1;
      if (chunk + 1 < end) store(slot);
    }
  }
};

}  // namespace medmoco
