// A result for each sample and feature, such as features times a matrix of few features: for each
// of a batch, scale (sum over terms of left . right), one or two terms.

#pragma once

#include <stdexcept>
#include <string>

#include "centred_product.cuh"

namespace medmoco {

// A batch of matrices; rows are contiguous.
struct ProductOutput {
  void* data;
  Storage storage;
  int64_t batch_stride, row_stride;  // in elements
};

struct ApplyArguments {
  int64_t batch, rows, columns;
  Term terms[2];
  int term_count;
  float scale;
  const float* factor;  // one more, in memory; null: none
  // Of each column: so many times the element of `features` is subtracted before it is scaled;
  // null: none.
  const float* feature_factor;
  CentredOperand features;
  ProductOutput out;
};

// An element of matrix 0, centred.
__device__ __forceinline__ float centred_element(const CentredOperand& operand, int64_t row,
                                                 int64_t column) {
  const float high = operand.mean_high ? operand.mean_high[column] : 0;
  const float low = operand.mean_low ? operand.mean_low[column] : 0;
  return load(operand.values, row, column) - high - low;
}

// Writes a tile. It goes through shared memory, so that neighbours in memory are written together.
template <typename S>
__device__ __forceinline__ void write_tile(const ApplyArguments& p, const ProductSums<S>& sums,
                                           int64_t batch, int64_t first_row, int64_t first_column) {
  // What lanes of a warp write together, four rows of eight columns, is in different banks.
  auto place = [](int row, int column) {
    return reinterpret_cast<float*>(shared_memory()) + row * S::kSide + (column ^ row % 4 * 8);
  };
  block_barrier();  // nobody multiplies any more
  for_each_value<S::kLeftTiles, S::kRightTiles>([&](int m, int n, int i, int) {
    const auto at = PlaceInTile<S>::of(m, n, i);
    shared_store(place(at.row, at.column), sums[m][n][i]);
  });
  block_barrier();  // all sums are there
  const float scale = p.factor ? p.scale * *p.factor : p.scale;
  const int column_in_tile = thread_id() % S::kSide;
  const int64_t column = first_column + column_in_tile;
  if (column >= p.columns) return;
  const float feature_factor = p.feature_factor ? p.feature_factor[column] : 0;
#pragma unroll 4
  for (int i = thread_id() / S::kSide; i < S::kSide; i += S::kThreads / S::kSide) {
    const int64_t row = first_row + i;
    if (row >= p.rows) return;
    float value = shared_load(place(i, column_in_tile));
    if (p.feature_factor) value -= feature_factor * centred_element(p.features, row, column);
    store(p.out.data, p.out.storage, batch * p.out.batch_stride + row * p.out.row_stride + column,
          value * scale);
  }
}

template <typename S, MapLayout kRight>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerMultiprocessor)
    centred_apply_kernel(ApplyArguments p) {
  const int64_t column_tiles = (p.columns + S::kSide - 1) / S::kSide;
  const int64_t row_tiles = (p.rows + S::kSide - 1) / S::kSide;
  const int64_t batch = block_id() / column_tiles / row_tiles;
  const int64_t first_row = block_id() / column_tiles % row_tiles * S::kSide;
  const int64_t first_column = block_id() % column_tiles * S::kSide;
  TileProduct<S, kRowsAreLines, kRight> product;
  ProductSums<S> sums = {};
#pragma unroll 1
  for (int t = 0; t < p.term_count; ++t) {
    product.add(sums, p.terms[t], batch, first_row, first_column, 0,
                int(product_chunks(p.terms[t].depth)));
  }
  write_tile<S>(p, sums, batch, first_row, first_column);
}

// The right operands have the depth along their rows (kRowsAreLines) or rows as depth; the left
// ones have it along their rows.
template <typename Kind, MapLayout kRight>
void centred_apply(const char* name, const ApplyArguments& p, int multiprocessors, Stream stream) {
  auto tiles = [&](int64_t side) {
    return p.batch * ((p.rows + side - 1) / side) * ((p.columns + side - 1) / side);
  };
  auto run = [&]<typename S>() {
    if (tiles(S::kSide) > 0x7fffffff) {
      throw std::runtime_error(std::string(name) + ": more than 2^31 tiles of the output");
    }
    launch(name, centred_apply_kernel<S, kRight>, dim3(unsigned(tiles(S::kSide))),
           dim3(S::kThreads), S::kSharedBytes, stream, p);
  };
  using Large = ProductSizes<Kind, true>;
  const bool wide = p.columns > Large::kSide / 2;
  if (wide && tiles(Large::kSide) >= 2 * int64_t(multiprocessors)) {
    run.template operator()<Large>();
  } else {
    run.template operator()<ProductSizes<Kind, false>>();
  }
}

#if defined(__CUDACC__)  // for all operators in centred_product.cu
extern template void centred_apply<Tf32, kRowsAreLines>(const char*, const ApplyArguments&, int,
                                                        Stream);
extern template void centred_apply<Tf32, kRowsAreDepth>(const char*, const ApplyArguments&, int,
                                                        Stream);
extern template void centred_apply<Tf32x3, kRowsAreLines>(const char*, const ApplyArguments&, int,
                                                          Stream);
extern template void centred_apply<Tf32x3, kRowsAreDepth>(const char*, const ApplyArguments&, int,
                                                          Stream);
#endif

}  // namespace medmoco
