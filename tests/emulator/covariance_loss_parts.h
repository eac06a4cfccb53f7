// What the Gram form of covariance_loss does besides its product: ranks, the direct columns and
// their rows of the covariance.

#pragma once

#include <algorithm>
#include <numeric>

#include "covariance_loss_check.h"

namespace medmoco::test {

struct RankResult {
  std::vector<int> rank;
  std::vector<double> direct;  // (samples, kDirectColumns)
  std::vector<float> rounded, rest_variance;
  Values rows{0, 0};  // (kDirectColumns, dims)
  double sum = 0;     // of the direct rows' squares
};

// Means of zero, so that the squares may be anything.
inline RankResult run_rank(const StoredMatrix& stored, const std::vector<double>& squares,
                           uint64_t seed = 1) {
  EmulatedDevice device{.seed = seed};
  const int samples = stored.values.rows, dims = stored.values.columns;
  const size_t direct_size = size_t(samples) * kDirectColumns;
  const std::vector<double> mean(size_t(dims), 0);
  RankResult found{std::vector<int>(size_t(dims), -1), std::vector<double>(direct_size, 9),
                   std::vector<float>(direct_size, 9), std::vector<float>(size_t(dims), 9)};
  rank_columns({stored.matrix, samples, dims, mean.data(), squares.data(), found.rank.data(),
                found.direct.data(), found.rounded.data(), found.rest_variance.data()},
               &device);
  std::vector<float> rows(size_t(dims) * kDirectColumns, 9);
  std::vector<double> sums(size_t(direct_panels(dims)), 9);
  CovarianceCombineArguments combine{};
  combine.direct = {stored.matrix,       samples,     dims,       mean.data(), found.rank.data(),
                    found.direct.data(), rows.data(), sums.data()};
  combine_covariance(combine, direct_panels(dims), &device);
  found.rows = Values(kDirectColumns, dims);
  std::copy(rows.begin(), rows.end(), found.rows.data.begin());
  found.sum = std::accumulate(sums.begin(), sums.end(), 0.0);
  return found;
}

inline std::vector<int> expected_rank(const std::vector<double>& squares) {
  std::vector<int> order(squares.size()), rank(squares.size());
  std::iota(order.begin(), order.end(), 0);
  auto key = [&](int c) { return std::isnan(squares[c]) ? HUGE_VAL : double(float(squares[c])); };
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) > key(b); });
  for (size_t i = 0; i < order.size(); ++i) rank[size_t(order[i])] = int(i);
  return rank;
}

inline RankResult check_rank(const StoredMatrix& stored, const std::vector<double>& squares,
                             const std::string& what) {
  const auto found = run_rank(stored, squares);
  const int samples = stored.values.rows, dims = stored.values.columns;
  const auto expected = expected_rank(squares);
  expect(found.rank == expected, "ranks: " + what);
  Values direct(samples, kDirectColumns);
  for (int c = 0; c < dims; ++c) {
    const bool is_direct = expected[c] < kDirectColumns;
    for (int i = 0; is_direct && i < samples; ++i)
      direct.at(i, expected[c]) = stored.values.at(i, c);
    expect_equal(found.rest_variance[c], is_direct ? 0 : float(squares[c] / (samples - 1)),
                 "variance of the rest: " + what);
  }
  Values rows(kDirectColumns, dims);
  double sum = 0;
  for (int s = 0; s < kDirectColumns; ++s) {
    for (int c = 0; c < dims; ++c) {
      double& row = rows.at(s, c);
      for (int i = 0; i < samples && s != expected[c]; ++i) {
        row += direct.at(i, s) * stored.values.at(i, c) / (samples - 1);
      }
      sum += (expected[c] < kDirectColumns ? 1 : 2) * row * row;
    }
  }
  expect(found.direct == direct.data, "copies of the direct columns: " + what);
  expect(std::equal(direct.data.begin(), direct.data.end(), found.rounded.begin()),
         "rounded copies of the direct columns: " + what);
  expect(difference(found.rows, rows) <= 1e-7 * largest(rows), "direct rows: " + what);
  expect(std::abs(found.sum - sum) <= 1e-12 * sum, "squares of the direct rows: " + what);
  return found;
}

inline void test_ranks_are_those_of_a_sort() {
  for (const int dims : {2, 15, 16, 31, 33, 100, 1100}) {
    const std::string what = std::to_string(dims) + " dims";
    const StoredMatrix stored(Values::normal(11, dims, 7), Storage::kFloat32, Layout::kRows);
    auto values = Values::normal(1, dims, 8).data;
    for (double& value : values) value *= value;
    check_rank(stored, values, what);
    for (double& value : values) value = std::floor(2 * value);  // many are equal
    check_rank(stored, values, what + ", some equal");
    check_rank(stored, std::vector<double>(size_t(dims), 0.25), what + ", all equal");
    for (size_t c = 1; c < values.size(); c += 3) {
      values[c] = std::copysign(std::nan(""), c % 2 ? 1 : -1);
    }
    check_rank(stored, values, what + ", some NaN");
  }
}

// Two columns alike but for a little, so that what they share is small beside each term.
inline void test_direct_rows_are_summed_in_float64() {
  Values values = Values::normal(300, 40, 9);
  for (int i = 0; i < values.rows; ++i) {
    values.at(i, 3) = 1000 * (i % 2 ? 1 : -1);
    values.at(i, 20) = 1000 * (i / 2 % 2 ? 1 : -1) + (i == 7 ? 1 : 0);
  }
  std::vector<double> squares(40, 1);
  squares[3] = squares[20] = 9;
  const auto found = check_rank(StoredMatrix(values, Storage::kFloat32, Layout::kRows), squares,
                                "two columns at right angles");
  expect_equal(found.rows.at(0, 20), float(1000.0 / 299), "the covariance of the two");
}

// Besides the matrix, of what a GPU of 132 multiprocessors works on.
inline void test_memory_is_what_the_matrix_and_its_parts_take() {
  struct Size {
    int64_t samples, dims, mebibytes;
  };
  for (const Size& size : {Size{256, 2048, 8}, Size{256, 8192, 32}, Size{12544, 2048, 64}}) {
    const CovarianceFeatures f{{}, size.samples, size.dims};
    const auto plan = MomentPlan::of(f.shape(), 132);
    const int64_t matrix = f.side() * f.side() * int64_t(sizeof(float));
    const int64_t forward = CovarianceWorkspace::of(f, &plan, 132, nullptr).bytes;
    const int64_t backward = CovarianceWorkspace::of(f, nullptr, 132, nullptr).bytes;
    const int64_t most = matrix + std::max(forward, backward);
    expect(most <= size.mebibytes << 20, "at most " + std::to_string(size.mebibytes) +
                                             " MiB, got " + std::to_string(most) + " bytes");
    expect(backward < f.samples * f.dims * 4, "no copy of the features for the gradient");
  }
}

}  // namespace medmoco::test
