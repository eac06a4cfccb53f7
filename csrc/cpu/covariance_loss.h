// What the kernels of covariance_loss work on. The products are of a matrix with itself: the
// covariance, of side D, or the Gram form's matrix, of side N. For covariance_loss.cpp alone.

#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "operand.h"

namespace medmoco {
namespace {

constexpr int64_t kDirectColumns = 16;  // of largest variance, kept out of the Gram form's matrix
constexpr int64_t kMomentColumns = 256;
// Tile of a product: whole panels of every instruction set; features mostly come in such numbers.
constexpr int64_t kTile = 128;
// Share of the gradient that a task computes.
constexpr int64_t kGradientColumns = 128, kGradientRows = 8 * kTile;

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Extent {
  int64_t start, size;

  int64_t parts(int64_t part_size) const { return ceil_divide(size, part_size); }
  // The `index`th of its parts of `part_size`; the last may be smaller.
  Extent part(int64_t index, int64_t part_size) const {
    const int64_t offset = index * part_size;
    return {start + offset, std::min(part_size, size - offset)};
  }
};

template <typename T, typename Scalar>
struct Features {
  Matrix<T, Scalar> values;
  int64_t samples, dims;
  // The mean in two parts, rounded to T and what that leaves out: the rounding alone would move
  // all samples the same way, and the gradient with them.
  std::vector<T> mean, mean_rest;
  // Filled in the Gram form alone:
  std::vector<double> variance = {};
  std::vector<int64_t> direct = {};       // columns, sorted
  std::vector<T> direct_values = {};      // [direct][sample], centred
  std::vector<T> direct_covariance = {};  // [direct][direct] with a diagonal of zero

  explicit Features(const Tensor& features)
      : values(features),
        samples(features.size(0)),
        dims(features.size(1)),
        mean(dims, T(0)),
        mean_rest(dims, T(0)) {}

  Extent rows() const { return {0, samples}; }
  Extent columns() const { return {0, dims}; }
  bool gram() const { return samples < dims; }
  int64_t side() const { return std::min(samples, dims); }
  int64_t depth() const { return std::max(samples, dims); }
  bool is_direct(int64_t column) const {
    return std::binary_search(direct.begin(), direct.end(), column);
  }
};

// Tiles on and below the diagonal, each summed in `slices` stretches of the depth.
template <typename T, typename Scalar>
struct Product {
  const Features<T, Scalar>& features;
  int64_t slice_depth, slices;
  T* matrix;   // (side, side)
  T* partial;  // [tile][slice][kTile * kTile] where there are several slices
  double* tile_sums;

  int64_t tiles() const {
    const int64_t tiles_a_side = ceil_divide(features.side(), kTile);
    return tiles_a_side * (tiles_a_side + 1) / 2;
  }

  Extent slice(int64_t index) const { return Extent{0, features.depth()}.part(index, slice_depth); }

  // Rows and columns of a tile.
  std::pair<Extent, Extent> extents(int64_t tile) const {
    int64_t row = 0;
    for (; tile > row; ++row) tile -= row + 1;
    const Extent side{0, features.side()};
    return {side.part(row, kTile), side.part(tile, kTile)};
  }
};

template <typename T, typename Scalar>
struct Gradient {
  const Features<T, Scalar>& features;
  const T* matrix;
  T scale;
  Scalar* output;

  int64_t tasks() const {
    return features.rows().parts(kGradientRows) * features.columns().parts(kGradientColumns);
  }

  // Rows and columns of a task.
  std::pair<Extent, Extent> extents(int64_t task) const {
    const int64_t groups = features.columns().parts(kGradientColumns);
    return {features.rows().part(task / groups, kGradientRows),
            features.columns().part(task % groups, kGradientColumns)};
  }
};

}  // namespace
}  // namespace medmoco
