// Column moments on the emulator against their formula in float64.

#pragma once

#include <bit>
#include <cstring>
#include <sstream>
#include <string>

#include "cuda/column_moments.cuh"
#include "expect.h"
#include "stored_matrix.h"

namespace medmoco::test {

struct MomentCase {
  int rows, columns;
  int multiprocessors = 1;
  Storage storage = Storage::kFloat32;
  Layout layout = Layout::kRows;
  uint64_t seed = 1;  // of the order in which threads run

  std::string text() const {
    std::ostringstream text;
    text << "rows " << rows << ", columns " << columns << ", multiprocessors " << multiprocessors
         << ", storage " << int(storage) << ", layout " << int(layout) << ", seed " << seed;
    return text.str();
  }
};

struct MomentResult {
  std::vector<double> mean, squares;
  std::vector<float> high, low;

  explicit MomentResult(size_t columns)
      : mean(columns, -9), squares(columns, -9), high(columns, -9), low(columns, -9) {}
  Moments out() { return {mean.data(), high.data(), low.data(), squares.data()}; }
  bool same_bits(const MomentResult& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return same(mean, other.mean) && same(squares, other.squares) && same(high, other.high) &&
           same(low, other.low);
  }
};

// Throws what the emulator finds wrong.
inline void run_moments(const MomentCase& c, const StoredMatrix& stored, const Moments& out) {
  EmulatedDevice device{.seed = c.seed};
  const int64_t bytes = column_moments_bytes(c.rows, c.columns, c.multiprocessors);
  std::vector<double> workspace(size_t(bytes) / sizeof(double), std::nan(""));
  column_moments(stored.matrix, c.rows, c.columns, out, workspace.data(), c.multiprocessors,
                 &device);
}

inline MomentResult check_moments(const MomentCase& c, const Values& values) {
  const StoredMatrix stored(values, c.storage, c.layout);
  MomentResult found(size_t(c.columns));
  run_moments(c, stored, found.out());
  for (int j = 0; j < c.columns; ++j) {
    double mean = 0, squares = 0;
    for (int i = 0; i < c.rows; ++i) mean += stored.values.at(i, j) / c.rows;
    for (int i = 0; i < c.rows; ++i) squares += std::pow(stored.values.at(i, j) - mean, 2);
    const std::string where = " of column " + std::to_string(j) + ": " + c.text();
    const auto expect_near = [&](double actual, double expected, double error, const char* what) {
      const bool near =
          std::isnan(expected) ? std::isnan(actual) : std::abs(actual - expected) <= error;
      expect(near,
             what + where + ": " + std::to_string(expected) + ", got " + std::to_string(actual));
    };
    const double size = std::abs(mean) + std::sqrt(squares / c.rows);
    expect_near(found.mean[j], mean, 1e-13 * size, "mean");
    // The rounding of this float64 mean and that of squares of values near it.
    expect_near(found.squares[j], squares, 1e-11 * squares + 1e-25 * mean * mean * c.rows,
                "squares");
    expect_near(double(found.high[j]) + found.low[j], mean, 1e-13 * size, "parts of the mean");
    expect_near(found.high[j], mean, 6e-8 * std::abs(mean) + 1e-45, "higher part of the mean");
  }
  return found;
}

}  // namespace medmoco::test
