// Kernels of covariance_loss, included by for_each_instruction_set.h. Each takes tasks until none
// is left; a task's result depends on its number alone.

#include "multiply.inl"
// After it, for its lanes.
#include "centred.inl"

// Padded, so that the rows of a tile do not share the sets of a cache.
constexpr int64_t kRowTileStride = kDepthBlock + 16;

// Shorter stretches than kDepthBlock: what is left of the covariance of decorrelated features, or
// of the gradient once the diagonal is subtracted, is small beside the terms of its sum.
constexpr int64_t kStretch = 64;

template <typename T, bool Transposed>
inline void multiply_stretches(const T* a, int64_t rows, int64_t stride, const T* b, int64_t depth,
                               T* out) {
  for (int64_t start = 0; start < depth; start += kStretch) {
    const int64_t length = depth - start < kStretch ? depth - start : kStretch;
    multiply<T, Transposed>(a + (Transposed ? start * stride : start), rows, stride,
                            b + start * kPanelRows<T>, length, out);
  }
}

// Sums of the centred features or, with Squares, of their squares: one of `slices` runs of rows by
// kMomentColumns columns a task, into sums[slice][column].
template <typename T, typename Scalar, bool Squares>
void moment_kernel(const Features<T, Scalar>& features, int64_t slice_rows, double* sums,
                   Tasks& tasks) {
  constexpr int64_t kRows = 16;
  AlignedVector<T> values(kRows * kMomentColumns);
  const int64_t groups = features.columns().parts(kMomentColumns);
  for (int64_t task; tasks.take(task);) {
    const int64_t slice = task / groups;
    const Extent columns = features.columns().part(task % groups, kMomentColumns);
    const Extent slice_extent = features.rows().part(slice, slice_rows);
    double sum[kMomentColumns] = {};
    for (int64_t index = 0; index < slice_extent.parts(kRows); ++index) {
      const Extent rows = slice_extent.part(index, kRows);
      copy_centred(features, rows, columns, values.data(), columns.size, 1);
      for (int64_t r = 0; r < rows.size; ++r) {
        for (int64_t c = 0; c < columns.size; ++c) {
          const double value = values[r * columns.size + c];
          sum[c] += Squares ? value * value : value;
        }
      }
    }
    std::memcpy(sums + slice * features.dims + columns.start, sum, columns.size * sizeof(double));
  }
}

// Left and right operand of a tile for one stretch of the summed dimension. In the primal form that
// runs over samples and both sides are columns; in the Gram form the other way round.
template <typename T>
struct Operands {
  AlignedVector<T> left = AlignedVector<T>(kTile * kRowTileStride);
  AlignedVector<T> right = AlignedVector<T>(kTile * kDepthBlock);

  T* panel(int64_t index) { return right.data() + index * kPanelRows<T> * kDepthBlock; }
};

template <typename T, typename Scalar>
void load_primal(const Features<T, Scalar>& features, Extent rows, Extent columns, Extent depth,
                 Operands<T>& operands) {
  copy_centred(features, depth, rows, operands.left.data(), kTile, 1);
  for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
    const Extent lanes = columns.part(p, kPanelRows<T>);
    copy_centred(features, depth, lanes, operands.panel(p), kPanelRows<T>, 1);
  }
}

// With the direct columns zero: the rest is what the Gram matrix is of.
template <typename T, typename Scalar>
void load_gram(const Features<T, Scalar>& features, Extent rows, Extent columns, Extent depth,
               Operands<T>& operands) {
  copy_centred(features, rows, depth, operands.left.data(), kRowTileStride, 1);
  for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
    const Extent lanes = columns.part(p, kPanelRows<T>);
    copy_centred(features, lanes, depth, operands.panel(p), 1, kPanelRows<T>);
  }
  for (int64_t direct : features.direct) {
    const int64_t k = direct - depth.start;
    if (k < 0 || k >= depth.size) continue;
    for (int64_t m = 0; m < rows.size; ++m) operands.left[m * kRowTileStride + k] = 0;
    for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
      std::memset(operands.panel(p) + k * kPanelRows<T>, 0, kPanelRows<T> * sizeof(T));
    }
  }
}

// Adds the products over a slice of the summed dimension to `out`, by panels: [panel][row][lane].
template <typename T, typename Scalar>
void add_products(const Product<T, Scalar>& product, Extent rows, Extent columns, Extent slice,
                  Operands<T>& operands, T* out) {
  const bool gram = product.features.gram();
  for (int64_t index = 0; index < slice.parts(kDepthBlock); ++index) {
    const Extent depth = slice.part(index, kDepthBlock);
    if (gram) {
      load_gram(product.features, rows, columns, depth, operands);
    } else {
      load_primal(product.features, rows, columns, depth, operands);
    }
    for (int64_t p = 0; p < columns.parts(kPanelRows<T>); ++p) {
      // What lies above the diagonal is its mirror image.
      const int64_t skipped = rows.start == columns.start ? p * kPanelRows<T> : 0;
      const int64_t first = skipped / kRegisterBlock * kRegisterBlock;
      const T* left = operands.left.data();
      const T* panel = operands.panel(p);
      T* place = out + (p * kTile + first) * kPanelRows<T>;
      if (gram) {
        multiply_stretches<T, false>(left + first * kRowTileStride, rows.size - first,
                                     kRowTileStride, panel, depth.size, place);
      } else {
        multiply_stretches<T, true>(left + first, rows.size - first, kTile, panel, depth.size,
                                    place);
      }
    }
  }
}

// Writes a tile and its mirror image to the matrix; returns the sum of the squares of both, in the
// primal form without the diagonal. Masked, as subtracted it would cost the digits of the rest.
template <typename T, typename Scalar>
double finish_tile(const Product<T, Scalar>& product, Extent rows, Extent columns, const T* out) {
  const T scale = T(1) / T(product.features.samples - 1);
  const int64_t side = product.features.side();
  double sum = 0, diagonal = 0;
  for (int64_t j = 0; j < columns.size; ++j) {
    const T* lane = out + j / kPanelRows<T> * kPanelRows<T> * kTile + j % kPanelRows<T>;
    for (int64_t m = rows.start == columns.start ? j : 0; m < rows.size; ++m) {
      const T value = lane[m * kPanelRows<T>] * scale;
      const int64_t row = rows.start + m, column = columns.start + j;
      product.matrix[row * side + column] = value;
      product.matrix[column * side + row] = value;
      (row == column ? diagonal : sum) += double(value) * value;
    }
  }
  return 2 * sum + (product.features.gram() ? diagonal : 0);
}

// One tile on or below the diagonal, for one slice of the summed dimension, a task.
template <typename T, typename Scalar>
void product_kernel(const Product<T, Scalar>& product, Tasks& tasks) {
  Operands<T> operands;
  AlignedVector<T> out(kTile * kTile);
  for (int64_t task; tasks.take(task);) {
    const int64_t tile = task / product.slices, slice = task % product.slices;
    const auto [rows, columns] = product.extents(tile);
    std::memset(out.data(), 0, out.size() * sizeof(T));
    add_products(product, rows, columns, product.slice(slice), operands, out.data());
    if (product.slices == 1) {
      product.tile_sums[tile] = finish_tile(product, rows, columns, out.data());
    } else {
      std::memcpy(product.partial + task * kTile * kTile, out.data(), out.size() * sizeof(T));
    }
  }
}

// Adds up the slices of one tile a task, in their order.
template <typename T, typename Scalar>
void combine_kernel(const Product<T, Scalar>& product, Tasks& tasks) {
  for (int64_t tile; tasks.take(tile);) {
    T* out = product.partial + tile * product.slices * kTile * kTile;
    for (int64_t slice = 1; slice < product.slices; ++slice) {
      const T* other = out + slice * kTile * kTile;
      for (int64_t i = 0; i < kTile * kTile; ++i) out[i] += other[i];
    }
    const auto [rows, columns] = product.extents(tile);
    product.tile_sums[tile] = finish_tile(product, rows, columns, out);
  }
}

// Covariance of the direct columns with those of a panel, [direct][lane], without variances.
template <typename T, typename Scalar>
void multiply_direct(const Features<T, Scalar>& features, int64_t column, const T* panel, T* out) {
  const int64_t count = features.direct.size();
  const T scale = T(1) / T(features.samples - 1);
  std::memset(out, 0, count * kPanelRows<T> * sizeof(T));
  multiply_stretches<T, false>(features.direct_values.data(), count, features.samples, panel,
                               features.samples, out);
  for (int64_t i = 0; i < count * kPanelRows<T>; ++i) out[i] *= scale;
  for (int64_t other = 0; other < count; ++other) {
    const int64_t lane = features.direct[other] - column;
    if (lane < 0 || lane >= kPanelRows<T>) continue;
    for (int64_t s = 0; s < count; ++s) {
      out[s * kPanelRows<T> + lane] = features.direct_covariance[s * count + other];
    }
  }
}

// What the direct columns' rows and columns of the covariance add to the sum of squares, by panels.
template <typename T, typename Scalar>
void direct_kernel(const Features<T, Scalar>& features, double* sums, Tasks& tasks) {
  const int64_t count = features.direct.size();
  AlignedVector<T> panel(features.samples * kPanelRows<T>), out(count * kPanelRows<T>);
  for (int64_t task; tasks.take(task);) {
    const Extent lanes = features.columns().part(task, kPanelRows<T>);
    copy_centred(features, features.rows(), lanes, panel.data(), kPanelRows<T>, 1);
    multiply_direct(features, lanes.start, panel.data(), out.data());
    double sum = 0;
    for (int64_t lane = 0; lane < lanes.size; ++lane) {
      double squares = 0;
      for (int64_t s = 0; s < count; ++s) {
        squares += double(out[s * kPanelRows<T> + lane]) * out[s * kPanelRows<T> + lane];
      }
      // The rest of the covariance holds the transpose of what lies outside the direct columns.
      sum += features.is_direct(lanes.start + lane) ? squares : 2 * squares;
    }
    sums[task] = sum;
  }
}

#include "covariance_loss_gradient.inl"
