// Matrices in memory as the kernels find them: any number format, any layout.

#pragma once

#include <sanitizer/asan_interface.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "cuda/stored.cuh"

namespace medmoco::test {

enum class Layout {
  kRows,
  kTransposed,
  kEveryOtherColumn,
  kOddStart,   // rows, from an element behind an aligned address on
  kRowsApart,  // with three elements between the rows
};
constexpr int kLayouts = 5;
constexpr int kStorages = 3;

// (rows, columns), to be changed before a StoredMatrix is made of them.
struct Values {
  int rows, columns;
  std::vector<double> data;

  Values(int rows, int columns) : rows(rows), columns(columns), data(size_t(rows) * columns) {}
  static Values normal(int rows, int columns, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    Values values(rows, columns);
    for (double& value : values.data) value = normal(random);
    return values;
  }
  double& at(int row, int column) { return data[size_t(row) * columns + column]; }
  double at(int row, int column) const { return data[size_t(row) * columns + column]; }

  // Column j = factor * column j + shift.
  Values& change_column(int column, double factor, double shift = 0) {
    for (int i = 0; i < rows; ++i) at(i, column) = factor * at(i, column) + shift;
    return *this;
  }
};

// The memory begins and ends where the matrix does, so that AddressSanitizer sees a read beyond.
struct StoredMatrix {
  Values values;  // as they were stored
  std::unique_ptr<unsigned char[]> memory;
  Matrix matrix;

  StoredMatrix(const Values& wanted, Storage storage, Layout layout)
      : values(wanted), matrix{nullptr, storage, 0, 0} {
    const int64_t rows = wanted.rows, columns = wanted.columns;
    const bool transposed = layout == Layout::kTransposed;
    const int64_t step = layout == Layout::kEveryOtherColumn ? 2 : 1;
    matrix.row_stride = transposed ? 1 : columns * step + (layout == Layout::kRowsApart ? 3 : 0);
    matrix.column_stride = transposed ? rows : step;
    const int64_t offset = layout == Layout::kOddStart ? 1 : 0;
    const int64_t last = (rows - 1) * matrix.row_stride + (columns - 1) * matrix.column_stride;
    const int64_t bytes = bytes_of(storage);
    if (rows > 0 && columns > 0) memory.reset(new unsigned char[(offset + last + 1) * bytes]);
    ASAN_POISON_MEMORY_REGION(memory.get(), offset * bytes);
    matrix.data = memory ? memory.get() + offset * bytes : nullptr;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t place = offset + i * matrix.row_stride + j * matrix.column_stride;
        store(memory.get(), storage, place, float(wanted.at(int(i), int(j))));
        values.at(int(i), int(j)) = load(matrix, i, j);
      }
    }
  }
  ~StoredMatrix() {
    if (memory)
      ASAN_UNPOISON_MEMORY_REGION(memory.get(),
                                  static_cast<const unsigned char*>(matrix.data) - memory.get());
  }
};

}  // namespace medmoco::test
