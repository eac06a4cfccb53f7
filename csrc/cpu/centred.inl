// Reading features less their mean, included inside the namespaces of for_each_instruction_set.h.

// to[r * row_step + c * column_step] = centred feature (rows.start + r, columns.start + c). One of
// the steps is 1; so may be one of the features' strides.
template <typename T, typename Scalar>
void copy_centred(const Features<T, Scalar>& features, Extent rows, Extent columns, T* to,
                  int64_t row_step, int64_t column_step) {
  const Matrix<T, Scalar>& values = features.values;
  const Scalar* from =
      values.data + rows.start * values.row_stride + columns.start * values.column_stride;
  const T* mean = features.mean.data() + columns.start;
  const T* mean_rest = features.mean_rest.data() + columns.start;
  if (column_step == 1 && values.column_stride == 1) {
    for (int64_t r = 0; r < rows.size; ++r) {
      for (int64_t c = 0; c < columns.size; ++c) {
        to[r * row_step + c] =
            static_cast<T>(from[r * values.row_stride + c]) - mean[c] - mean_rest[c];
      }
    }
    return;
  }
  if (row_step == 1 && values.row_stride == 1) {
    for (int64_t c = 0; c < columns.size; ++c) {
      for (int64_t r = 0; r < rows.size; ++r) {
        to[r + c * column_step] =
            static_cast<T>(from[r + c * values.column_stride]) - mean[c] - mean_rest[c];
      }
    }
    return;
  }
  // A transposition, in squares that stay in the first-level cache.
  constexpr int64_t kSide = 32;
  for (int64_t first_row = 0; first_row < rows.size; first_row += kSide) {
    const int64_t last_row = first_row + kSide < rows.size ? first_row + kSide : rows.size;
    for (int64_t first = 0; first < columns.size; first += kSide) {
      const int64_t last = first + kSide < columns.size ? first + kSide : columns.size;
      for (int64_t r = first_row; r < last_row; ++r) {
        for (int64_t c = first; c < last; ++c) {
          to[r * row_step + c * column_step] =
              static_cast<T>(from[r * values.row_stride + c * values.column_stride]) - mean[c] -
              mean_rest[c];
        }
      }
    }
  }
}
