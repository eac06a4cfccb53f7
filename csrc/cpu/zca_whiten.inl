// Kernels of zca_whiten, included by for_each_instruction_set.h.
//
// Both directions are two passes over the rows: the moment of two centred matrices, left^T right,
// and the rows multiplied by what was made of it. Each tile of rows is centred as it is laid out
// for the product, so that no centred copy of the whole exists.

#include "multiply.inl"
// After it, for its lanes.
#include "eigh.inl"

// Adds the columns of one group over the rows of a part: in double, so that a large mean leaves the
// features their digits.
template <typename T, typename Scalar>
void sum_kernel(const Matrix<T, Scalar>& values, const Part& part, double* sums) {
  const int64_t step = values.column_stride;
  for (int64_t row = part.first_row; row < part.last_row; ++row) {
    const Scalar* from = values.data + row * values.row_stride + part.column * step;
    if (step == 1) {  // so that the compiler takes whole vectors
      for (int64_t c = 0; c < part.group_size; ++c) sums[c] += double(static_cast<T>(from[c]));
    } else {
      for (int64_t c = 0; c < part.group_size; ++c)
        sums[c] += double(values.at(row, part.column + c));
    }
  }
}

// Rows and columns of `source` less the mean, row-major, zeros from `columns` to `stride`.
template <typename T, typename Scalar>
inline void centre(const Centred<T, Scalar>& source, int64_t first_row, int64_t rows,
                   int64_t column, int64_t columns, T* tile, int64_t stride) {
  const T* mean = source.mean + column;
  const int64_t step = source.values.column_stride;
  for (int64_t r = 0; r < rows; ++r) {
    const Scalar* from =
        source.values.data + (first_row + r) * source.values.row_stride + column * step;
    T* to = tile + r * stride;
    if (step == 1) {  // so that the compiler takes whole vectors
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(from[c]) - mean[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) to[c] = static_cast<T>(from[c * step]) - mean[c];
    }
    for (int64_t c = columns; c < stride; ++c) to[c] = 0;
  }
}

// The product so far of a panel, `rows` long, set to zero.
template <typename T>
inline T* zero_panel(AlignedVector<T>& panel, int64_t rows) {
  panel.assign(rows * kPanelRows<T>, T(0));
  return panel.data();
}

// Adds left^T right of one group, over the rows of a part and the columns of its panels, to
// moment[panel][row][lane]. Of a symmetric one only rows from the panel's first column on.
template <typename T, typename Scalar>
void moment_kernel(const Centred<T, Scalar>& left, const Centred<T, Scalar>& right, bool symmetric,
                   const Part& part, Workspace<T>& work, T* moment) {
  const int64_t size = part.group_size;
  work.tile.resize(kTileRows * size);
  work.panel.resize(kTileRows * kPanelRows<T>);
  for (int64_t row = part.first_row; row < part.last_row; row += kTileRows) {
    const int64_t left_rows = part.last_row - row;
    const int64_t rows = left_rows < kTileRows ? left_rows : kTileRows;
    centre(left, row, rows, part.column, size, work.tile.data(), size);
    for (int64_t p = part.first_panel; p < part.last_panel; ++p) {
      const int64_t first = p * kPanelRows<T>;
      const int64_t width = size - first < kPanelRows<T> ? size - first : kPanelRows<T>;
      centre(right, row, rows, part.column + first, width, work.panel.data(), kPanelRows<T>);
      const int64_t skipped = symmetric ? first : 0;
      multiply<T, true>(work.tile.data() + skipped, size - skipped, size, work.panel.data(), rows,
                        moment + (p * size + skipped) * kPanelRows<T>);
    }
  }
}

// Columns [first, first + kPanelRows) of a square matrix, or of its transpose, as a panel.
template <typename T, bool Transposed>
inline void pack_panel(const T* matrix, int64_t size, int64_t first, AlignedVector<T>& panel) {
  const int64_t width = size - first < kPanelRows<T> ? size - first : kPanelRows<T>;
  panel.resize(size * kPanelRows<T>);
  for (int64_t k = 0; k < size; ++k) {
    T* to = panel.data() + k * kPanelRows<T>;
    if (!Transposed && width == kPanelRows<T>) {
      std::memcpy(to, matrix + k * size + first, kPanelRows<T> * sizeof(T));
      continue;
    }
    for (int64_t lane = 0; lane < width; ++lane) {
      to[lane] = Transposed ? matrix[(first + lane) * size + k] : matrix[k * size + first + lane];
    }
    for (int64_t lane = width; lane < kPanelRows<T>; ++lane) to[lane] = 0;
  }
}

// matrix = vectors diag(scale) vectors^T, symmetric to the bit.
template <typename T>
void compose_kernel(const T* vectors, const T* scale, int64_t size, Workspace<T>& work, T* matrix) {
  work.tile.resize(size * size);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t k = 0; k < size; ++k) work.tile[i * size + k] = vectors[i * size + k] * scale[k];
  }
  for (int64_t first = 0; first < size; first += kPanelRows<T>) {
    pack_panel<T, true>(vectors, size, first, work.panel);
    T* product = zero_panel(work.product, size - first);
    multiply<T, false>(work.tile.data() + first * size, size - first, size, work.panel.data(), size,
                       product);
    for (int64_t i = first; i < size; ++i) {
      for (int64_t j = first; j <= i && j < first + kPanelRows<T>; ++j) {
        const T value = product[(i - first) * kPanelRows<T> + j - first];
        matrix[i * size + j] = matrix[j * size + i] = value;
      }
    }
  }
}

// The gradient by the covariance, divided by `samples`: the symmetric gradient by the matrix is
// taken to the eigenbasis, multiplied there by the divided differences of l^{-1/2}, and taken back.
template <typename T>
void covariance_gradient_kernel(const T* grad_matrix, const T* vectors, const T* scale,
                                int64_t size, int64_t samples, Workspace<T>& work, T* gradient) {
  work.tile.resize(size * size);
  T* rotated = work.tile.data();
  for (int64_t first = 0; first < size; first += kPanelRows<T>) {
    pack_panel<T, false>(vectors, size, first, work.panel);
    T* right = zero_panel(work.product, size);
    multiply<T, false>(grad_matrix, size, size, work.panel.data(), size, right);
    T* both = zero_panel(work.panel, size);
    multiply<T, true>(vectors, size, size, right, size, both);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = first; j < size && j < first + kPanelRows<T>; ++j) {
        // Of l^{-1/2} at scale_i = l_i^{-1/2}, -1 / (sqrt l_i sqrt l_j (sqrt l_i + sqrt l_j)):
        // nothing is divided by l_i - l_j, and the derivative itself stands on the diagonal.
        const T both_scales = scale[i] * scale[j];
        const T difference = -both_scales * (both_scales / (scale[i] + scale[j]));
        rotated[i * size + j] = difference * both[i * kPanelRows<T> + j - first];
      }
    }
  }
  for (int64_t first = 0; first < size; first += kPanelRows<T>) {
    pack_panel<T, true>(vectors, size, first, work.panel);
    T* right = zero_panel(work.product, size);
    multiply<T, false>(rotated, size, size, work.panel.data(), size, right);
    T* both = zero_panel(work.panel, size);
    multiply<T, false>(vectors, size, size, right, size, both);
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = first; j < size && j < first + kPanelRows<T>; ++j) {
        gradient[i * size + j] = both[i * kPanelRows<T> + j - first] / T(samples);
      }
    }
  }
}

// Rows of one group of the output: the sum over `terms` of centred values times matrix.
template <typename T, typename Scalar>
void apply_kernel(const std::vector<Term<T, Scalar>>& terms, const Part& part, Workspace<T>& work,
                  Scalar* out, int64_t out_stride) {
  const int64_t size = part.group_size, rows = part.last_row - part.first_row;
  work.tile.resize(terms.size() * rows * size);
  T* tile = work.tile.data();
  for (size_t t = 0; t < terms.size(); ++t) {
    centre(terms[t].rows, part.first_row, rows, part.column, size, tile + t * rows * size, size);
  }
  for (int64_t first = 0; first < size; first += kPanelRows<T>) {
    T* product = zero_panel(work.product, rows);
    for (size_t t = 0; t < terms.size(); ++t) {
      // The matrices of the groups follow each other: column / size of them lie before this one.
      pack_panel<T, false>(terms[t].matrices + part.column * size, size, first, work.panel);
      multiply<T, false>(tile + t * rows * size, rows, size, work.panel.data(), size, product);
    }
    const int64_t width = size - first < kPanelRows<T> ? size - first : kPanelRows<T>;
    for (int64_t r = 0; r < rows; ++r) {
      Scalar* to = out + (part.first_row + r) * out_stride + part.column + first;
      for (int64_t lane = 0; lane < width; ++lane) {
        to[lane] = static_cast<Scalar>(product[r * kPanelRows<T> + lane]);
      }
    }
  }
}

template <typename T, typename Scalar>
Kernels<T, Scalar> all_kernels() {
  return {kPanelRows<T>,          eigh_kernel<T>,
          sum_kernel<T, Scalar>,  moment_kernel<T, Scalar>,
          compose_kernel<T>,      covariance_gradient_kernel<T>,
          apply_kernel<T, Scalar>};
}
