// zca_whiten on the emulator against its formula in float64.

#pragma once

#include "expect.h"
#include "zca_whiten_case.h"
#include "zca_whiten_truth.h"

namespace medmoco::test {

// What a value may err by, beside the largest of its kind in the group.
template <typename Kind>
constexpr double kAllowed = 1e-5;
template <>
constexpr double kAllowed<Tf32> = 4e-3;

inline double rounding_of(Storage storage) {
  return storage == Storage::kBFloat16 ? 0x1p-8 : storage == Storage::kFloat16 ? 0x1p-11 : 0;
}

// The largest error over the largest of `beside`, of the elements of each group; NaN where NaN is
// due.
inline void expect_close(const std::string& what, const std::vector<float>& found,
                         const std::vector<double>& truth, const std::vector<double>& beside,
                         int groups, auto group_of, double allowed) {
  std::vector<double> largest(groups), error(groups);
  int missing = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    const int group = group_of(i);
    if (std::isnan(truth[i]) || std::isnan(found[i])) {
      missing += std::isnan(truth[i]) != std::isnan(found[i]);
      continue;
    }
    largest[group] = std::max(largest[group], std::abs(beside[i]));
    error[group] = std::max(error[group], std::abs(found[i] - truth[i]));
  }
  expect(missing == 0, "NaN where they are due, not of " + std::to_string(missing) + ": " + what);
  for (int group = 0; group < groups; ++group) {
    expect(error[group] <= allowed * std::max(largest[group], 1e-20),
           "a smaller error than " + std::to_string(error[group] / largest[group] * 1e6) +
               "e-6 of group " + std::to_string(group) + ": " + what);
  }
}

inline void expect_truth(const WhitenCase& c, const WhitenTruth& truth, const WhitenResult& found,
                         double allowed) {
  const auto column = [&](size_t i) { return int(i) % c.columns() / c.size; };
  const auto row = [&](size_t i) { return int(i) / (c.size * c.size); };
  const double rounded = allowed + rounding_of(c.storage);
  expect_close("whitened, " + c.text(), found.whitened, truth.whitened, truth.whitened, c.groups,
               column, rounded);
  expect_close("gradient, " + c.text(), found.grad_features, truth.grad_features,
               truth.grad_times_matrix, c.groups, column, rounded);
  expect_close("matrix, " + c.text(), found.matrix, truth.matrix, truth.matrix, c.groups, row,
               allowed);
  expect_close("mean, " + c.text(), found.mean, truth.mean, truth.mean, c.groups, column, 1e-6);
  for (int i = 0; i < int(found.matrix.size()); ++i) {
    const int group = row(i) * c.size * c.size, a = (i - group) / c.size, b = i % c.size;
    const float other = found.matrix[group + b * c.size + a];
    expect(found.matrix[i] == other || std::isnan(other), "a symmetric matrix: " + c.text());
  }
}

// Errors are told with the case, whose seed repeats the run.
template <typename Kind>
WhitenResult check(const WhitenCase& c, const Values& features, double allowed = kAllowed<Kind>) {
  const MatrixInMemory in(c, features, c.features), grad(c, random_values(c, 2, 0.3), c.grad);
  WhitenResult found;
  try {
    found = run<Kind>(c, in, grad);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
    return found;
  }
  const auto truth = whiten_in_float64(in.values, grad.values, c.samples, c.groups, c.size, c.eps);
  expect_truth(c, truth, found, allowed);
  return found;
}

template <typename Kind>
WhitenResult check(const WhitenCase& c) {
  return check<Kind>(c, random_values(c, 1, 2));
}

template <typename Kind>
void expect_same_bits(const WhitenCase& c, const WhitenResult& expected) {
  try {
    const MatrixInMemory features(c, random_values(c, 1, 2), c.features);
    const MatrixInMemory grad(c, random_values(c, 2, 0.3), c.grad);
    expect(run<Kind>(c, features, grad).same_bits(expected), "the same bits: " + c.text());
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
  }
}

}  // namespace medmoco::test
