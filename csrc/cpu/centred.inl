// Reading features less their mean, included inside the namespaces of for_each_instruction_set.h.

// to[c * step + r] = centred feature (r, c) of a square with a vector's lanes for its side.
template <typename T, typename Scalar>
inline void copy_square(const Scalar* from, int64_t row_stride, const T* mean, const T* mean_rest,
                        T* to, int64_t step) {
  typename LanesOf<T>::Vector square[kLanes<T>];
  for (int r = 0; r < kLanes<T>; ++r) {
    T row[kLanes<T>];
    for (int c = 0; c < kLanes<T>; ++c) row[c] = static_cast<T>(from[r * row_stride + c]);
    square[r] = load(row) - load(mean) - load(mean_rest);
  }
  transpose<T>(square);
  for (int c = 0; c < kLanes<T>; ++c) store(to + c * step, square[c]);
}

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
  // A transposition: whole squares by shuffles, what is left one by one.
  constexpr int64_t kSide = kLanes<T>;
  const bool by_shuffles = row_step == 1 && values.column_stride == 1;
  for (int64_t row = 0; row < rows.size; row += kSide) {
    for (int64_t column = 0; column < columns.size; column += kSide) {
      if (by_shuffles && row + kSide <= rows.size && column + kSide <= columns.size) {
        copy_square(from + row * values.row_stride + column, values.row_stride, mean + column,
                    mean_rest + column, to + row + column * column_step, column_step);
        continue;
      }
      for (int64_t r = row; r < rows.size && r < row + kSide; ++r) {
        for (int64_t c = column; c < columns.size && c < column + kSide; ++c) {
          to[r * row_step + c * column_step] =
              static_cast<T>(from[r * values.row_stride + c * values.column_stride]) - mean[c] -
              mean_rest[c];
        }
      }
    }
  }
}
