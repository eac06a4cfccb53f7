// Few results from a long depth, such as the covariance of features over all samples: for each of a
// batch, left^T right or, of one operand with itself, the half of it on and below the diagonal.
//
// The work is a list of units, a tile of the result and a chunk of the depth each; a block takes a
// run of them, and leaves a part of each tile that its run reaches into. Who comes next adds up the
// parts of a tile, in order.

#pragma once

#include "centred_product.cuh"

namespace medmoco {

// The tiles of the results, numbered through the batch.
struct MomentTiles {
  int side;  // rows and columns of a tile
  int row_tiles, column_tiles;
  bool symmetric;  // then tiles above the diagonal are left out

  struct Place {
    int64_t batch;
    int row, column;  // of tiles
  };

  __host__ __device__ int64_t of_each() const {
    return symmetric ? int64_t(row_tiles) * (row_tiles + 1) / 2 : int64_t(row_tiles) * column_tiles;
  }
  __device__ Place place(int64_t tile) const {
    const int64_t batch = tile / of_each(), index = tile % of_each();
    if (!symmetric) return {batch, int(index / column_tiles), int(index % column_tiles)};
    int64_t row = int64_t((sqrtf(8.0f * float(index) + 1.0f) - 1.0f) * 0.5f);  // or beside it
    while (row * (row + 1) / 2 > index) --row;
    while ((row + 1) * (row + 2) / 2 <= index) ++row;
    return {batch, int(row), int(index - row * (row + 1) / 2)};
  }
  __device__ int64_t tile(int64_t batch, int row, int column) const {
    const int64_t before = symmetric ? int64_t(row) * (row + 1) / 2 : int64_t(row) * column_tiles;
    return batch * of_each() + before + column;
  }
};

// What the blocks leave.
struct MomentParts {
  MomentTiles tiles;
  Schedule schedule;
  float* data;  // (parts, side, side)

  // In data, where the part begins that a block leaves of a tile.
  __device__ __forceinline__ int64_t part(int block, int tile) const {
    return int64_t(schedule.part(block, tile)) * tiles.side * tiles.side;
  }
  // An element of a tile: the sum of its parts.
  __device__ __forceinline__ float element(int64_t tile, int row, int column) const {
    const int first = schedule.first_block(int(tile)), last = schedule.last_block(int(tile));
    double sum = 0;
    for (int block = first; block <= last; ++block) {
      sum += data[part(block, int(tile)) + row * tiles.side + column];
    }
    return float(sum);
  }
  // Of the result itself, on both sides of the diagonal.
  __device__ __forceinline__ float at(int64_t batch, int row, int column) const {
    if (tiles.symmetric && row < column) return at(batch, column, row);
    const int64_t tile = tiles.tile(batch, row / tiles.side, column / tiles.side);
    return element(tile, row % tiles.side, column % tiles.side);
  }
};

// Both operands have features as columns, and the depth runs along the rows of neither
// (kRowsAreDepth) or of both (kRowsAreLines).
struct MomentShape {
  int64_t batch, left_lines, right_lines, depth;
  bool symmetric;  // left and right are the same
};

struct MomentPlan {
  bool large;
  MomentParts parts;

  int64_t bytes() const {
    const int64_t side = parts.tiles.side;
    return parts.schedule.parts() * side * side * int64_t(sizeof(float));
  }

  static MomentPlan of(const MomentShape& shape, int multiprocessors);
};

inline MomentPlan MomentPlan::of(const MomentShape& shape, int multiprocessors) {
  using Small = ProductSizes<Tf32, false>;
  using Large = ProductSizes<Tf32, true>;
  constexpr int64_t kLeastLines = 512;  // from where on large tiles are worth their corners
  constexpr int64_t kLeastChunks = 4;   // of a part, which has to be written and read again
  const int64_t lines = shape.left_lines < shape.right_lines ? shape.left_lines : shape.right_lines;
  const bool large = lines >= kLeastLines;
  const int side = large ? Large::kSide : Small::kSide;
  MomentTiles tiles{side, int((shape.left_lines + side - 1) / side),
                    int((shape.right_lines + side - 1) / side), shape.symmetric};
  const int64_t count = shape.batch * tiles.of_each(), chunks = product_chunks(shape.depth);
  const int64_t places = multiprocessors * int64_t(large ? Large::kBlocksPerMultiprocessor
                                                         : Small::kBlocksPerMultiprocessor);
  const int64_t useful = (count * chunks + kLeastChunks - 1) / kLeastChunks;
  return {large, {tiles, Schedule::of(count, chunks, places < useful ? places : useful), nullptr}};
}

struct MomentArguments {
  Term term;
  MomentParts parts;
};

template <typename S, MapLayout kLayout>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor)
    centred_moment_kernel(MomentArguments p) {
  const Schedule& schedule = p.parts.schedule;
  TileProduct<S, kLayout, kLayout> product;
  for (int tile = schedule.first_query_tile(block_id()); schedule.has_query_tile(block_id(), tile);
       ++tile) {
    const auto place = p.parts.tiles.place(tile);
    ProductSums<S> sums = {};
    product.add(sums, p.term, place.batch, int64_t(place.row) * S::kSide,
                int64_t(place.column) * S::kSide, schedule.first_queue_tile(block_id(), tile),
                schedule.end_queue_tile(block_id(), tile));
    float* part = p.parts.data + p.parts.part(block_id(), tile);
    for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int) {
      const auto at = PlaceInTile<S>::of(m, n, i);
      part[at.row * S::kSide + at.column] = sums[m][n][i];
    });
  }
}

// Leaves the parts in plan.parts.data. The depth of `term` is that of the plan's shape.
template <typename Kind, MapLayout kLayout>
void centred_moment(const char* name, const MomentPlan& plan, const Term& term, Stream stream) {
  auto run = [&]<typename S>() {
    launch(name, centred_moment_kernel<S, kLayout>, dim3(unsigned(plan.parts.schedule.blocks())),
           dim3(S::kThreads), S::kSharedBytes, stream, MomentArguments{term, plan.parts});
  };
  if (plan.large) {
    run.template operator()<ProductSizes<Kind, true>>();
  } else {
    run.template operator()<ProductSizes<Kind, false>>();
  }
}

#if defined(__CUDACC__)  // for all operators in centred_product.cu
extern template void centred_moment<Tf32, kRowsAreLines>(const char*, const MomentPlan&,
                                                         const Term&, Stream);
extern template void centred_moment<Tf32, kRowsAreDepth>(const char*, const MomentPlan&,
                                                         const Term&, Stream);
extern template void centred_moment<Tf32x3, kRowsAreLines>(const char*, const MomentPlan&,
                                                           const Term&, Stream);
extern template void centred_moment<Tf32x3, kRowsAreDepth>(const char*, const MomentPlan&,
                                                           const Term&, Stream);
#endif

}  // namespace medmoco
