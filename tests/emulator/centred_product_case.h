// Centred operands in any layout and number format, with their values in float64.

#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/centred_apply.cuh"
#include "cuda/centred_moment.cuh"
#include "expect.h"

namespace medmoco::test {

enum class Stored {
  kTogether,    // rows one after the other
  kOddStart,    // from one element behind an aligned address on
  kRowsApart,   // three elements between rows
  kEveryOther,  // two elements a column
  kTransposed,
};

struct OperandCase {
  int batch, rows, columns;
  Storage storage = Storage::kFloat32;
  Stored stored = Stored::kTogether;
  bool centred = false, ranked = false, zero_diagonal = false;

  std::string text() const {
    return "batch " + std::to_string(batch) + ", " + std::to_string(rows) + " x " +
           std::to_string(columns) + ", storage " + std::to_string(int(storage)) + ", stored " +
           std::to_string(int(stored)) + (centred ? ", centred" : "") + (ranked ? ", ranked" : "") +
           (zero_diagonal ? ", zero diagonal" : "");
  }
};

constexpr int kLeastRank = 3;

// The memory ends where the operand does, so that AddressSanitizer sees a read beyond.
struct OperandInMemory {
  OperandCase c;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<float> mean_high, mean_low;  // (batch, columns)
  std::vector<int> rank;
  std::vector<double> values;  // (batch, rows, columns), as a product takes them
  CentredOperand operand{};

  explicit OperandInMemory(const OperandCase& c, uint64_t seed = 1) : c(c) {
    const int64_t gap = c.stored == Stored::kRowsApart ? 3 : 0;
    const bool transposed = c.stored == Stored::kTransposed;
    const int64_t column_stride = transposed ? c.rows : c.stored == Stored::kEveryOther ? 2 : 1;
    const int64_t row_stride = transposed ? 1 : c.columns * column_stride + gap;
    const int64_t batch_stride = int64_t(c.rows) * c.columns * 2 + c.rows * gap;
    const int64_t offset = c.stored == Stored::kOddStart ? 1 : 0, size = bytes_of(c.storage);
    const int64_t count = offset + (c.batch - 1) * batch_stride + (c.rows - 1) * row_stride +
                          (c.columns - 1) * column_stride + 1;
    memory.reset(new unsigned char[count * size]);
    operand.values = {memory.get() + offset * size, c.storage, row_stride, column_stride};
    operand.batch_stride = batch_stride;
    operand.rows = c.rows;
    operand.columns = c.columns;
    operand.zero_diagonal = c.zero_diagonal;
    choose_means(seed);
    fill(seed);
  }

  double at(int batch, int row, int column) const {
    return values[(int64_t(batch) * c.rows + row) * c.columns + column];
  }

 private:
  void choose_means(uint64_t seed) {
    for (int i = 0; i < c.batch * c.columns; ++i) {
      mean_high.push_back(c.centred ? float(5 + i % 7) : 0);
      mean_low.push_back(c.centred ? 0.25f * float(i % 3) : 0);  // large, so that it is missed
    }
    std::mt19937_64 random(seed + 9);
    for (int i = 0; i < c.columns; ++i) rank.push_back(i);
    std::shuffle(rank.begin(), rank.end(), random);
    if (c.centred) {
      operand.mean_high = mean_high.data();
      operand.mean_low = mean_low.data();
      operand.mean_batch_stride = c.columns;
    }
    if (c.ranked) operand.rank = rank.data(), operand.least_rank = kLeastRank;
  }
  void fill(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    auto* data = const_cast<void*>(operand.values.data);
    for (int b = 0; b < c.batch; ++b) {
      for (int r = 0; r < c.rows; ++r) {
        for (int k = 0; k < c.columns; ++k) {
          const int64_t place = b * operand.batch_stride + r * operand.values.row_stride +
                                k * operand.values.column_stride;
          const int64_t i = b * c.columns + k;
          store(data, c.storage, place, normal(random) + mean_high[i] + mean_low[i]);
          const float value = value_of(load_bits(data, c.storage, place), c.storage);
          const bool zero = (c.ranked && rank[k] < kLeastRank) || (c.zero_diagonal && r == k);
          values.push_back(zero ? 0 : double(value) - mean_high[i] - mean_low[i]);
        }
      }
    }
  }
};

// Relative to the sum of the magnitudes of what is added up.
template <typename Kind>
constexpr double kProductError = 5e-7;
template <>
constexpr double kProductError<Tf32> = 1e-3;

// A sum of products, and how large its terms are.
struct Sum {
  double value = 0, magnitude = 0;

  void add(double left, double right) {
    value += left * right;
    magnitude += std::abs(left * right);
  }
};

template <typename Kind>
bool is_close(double found, const Sum& expected, double rounding = 0) {
  return std::abs(found - expected.value) <=
         kProductError<Kind> * expected.magnitude + rounding * std::abs(expected.value);
}

}  // namespace medmoco::test
