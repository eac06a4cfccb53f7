// All tests of zca_whiten with one kind of operand. Each kind is a program of its own, so that they
// build side by side.

#pragma once

#include "pairwise.h"
#include "zca_whiten_check.h"

namespace medmoco::test {

inline std::vector<WhitenCase> whiten_grid() {
  const std::vector<int> samples = {1, 2, 33, 64, 130}, groups = {1, 2, 3, 5};
  const std::vector<int> sizes = {1, 3, 8, 13, 20}, multiprocessors = {1, 2, 7};
  std::vector<WhitenCase> cases;
  for (const auto& choice :
       pairwise_choices<7>({int(samples.size()), int(groups.size()), int(sizes.size()),
                            int(multiprocessors.size()), 3, kLayouts, kLayouts})) {
    cases.push_back({.samples = samples[choice[0]],
                     .groups = groups[choice[1]],
                     .size = sizes[choice[2]],
                     .storage = Storage(choice[4]),
                     .features = Rows(choice[5]),
                     .grad = Rows(choice[6]),
                     .multiprocessors = multiprocessors[choice[3]],
                     .seed = cases.size() + 1});
  }
  return cases;
}

template <typename Kind>
void test_the_result_is_that_of_float64() {
  for (const WhitenCase& c : whiten_grid()) check<Kind>(c);
}

// So many that blocks share them out, both for the means and for the products.
template <typename Kind>
void test_many_samples() {
  check<Kind>({.samples = 1100, .groups = 2, .size = 3, .multiprocessors = 7});
}

template <typename Kind>
void test_large_groups() {
  check<Kind>({.samples = 150, .groups = 1, .size = 64});
  check<Kind>({.samples = 9, .groups = 1, .size = 67, .storage = Storage::kBFloat16});
}

// Features that hang together in distant pairs, whose eigenvectors are found in a sweep.
template <typename Kind>
void test_the_largest_group() {
  const WhitenCase c{.samples = 256, .groups = 1, .size = 128};
  Values features(size_t(c.samples) * c.size);
  for (int i = 0; i < int(features.size()); ++i) {
    const int row = i / c.size, column = i % c.size;
    // Rows of a Hadamard matrix are orthogonal, and all but row 0 have mean 0.
    const auto hadamard = [&](int k) { return __builtin_popcount(row & k) % 2 ? -1.0 : 1.0; };
    features[i] = column < 64 ? hadamard(column + 1)
                              : 0.01 * column * hadamard(column + 1) + hadamard(column - 63);
  }
  check<Kind>(c, features);
}

template <typename Kind>
void test_twenty_schedules_give_the_same_bits() {
  WhitenCase c{.samples = 40, .groups = 2, .size = 5};
  const WhitenResult expected = check<Kind>(c);
  for (c.seed = 2; c.seed <= 20; ++c.seed) expect_same_bits<Kind>(c, expected);
}

template <typename Kind>
void test_any_layout_gives_the_same_bits() {
  WhitenCase c{.samples = 33, .groups = 2, .size = 8};
  const WhitenResult expected = check<Kind>(c);
  for (int layout = 0; layout < kLayouts; ++layout) {
    c.features = Rows(layout);
    c.grad = Rows((layout + 1) % kLayouts);
    expect_same_bits<Kind>(c, expected);
  }
}

// Autograd hands over such a gradient for a sum over the samples.
template <typename Kind>
void test_a_gradient_of_stride_zero_is_taken() {
  const WhitenCase c{.samples = 12, .groups = 1, .size = 4};
  const MatrixInMemory features(c, random_values(c, 1), c.features);
  Values weights(size_t(c.samples) * c.size);
  for (int i = 0; i < int(weights.size()); ++i) weights[i] = i % c.size;
  MatrixInMemory full(c, weights, Rows::kTogether);
  const auto expected = run<Kind>(c, features, full);
  full.matrix.row_stride = 0;
  expect(run<Kind>(c, features, full).same_bits(expected), "the same of a repeated row");
}

template <typename Kind>
void test_directions_without_variance_are_harmless() {
  WhitenCase c{.samples = 30, .groups = 3, .size = 6};
  Values features = random_values(c, 1);
  for (int row = 0; row < c.samples; ++row) {
    double* values = features.data() + row * c.columns();
    values[1] = 7;                                      // constant
    values[8] = values[6];                              // a duplicate
    for (int i = 12; i < 18; ++i) values[i] = 1.0 / 3;  // nothing else
  }
  check<Kind>(c, features);
  c.samples = 3;  // fewer than a group has features
  check<Kind>(c);
  c.samples = 1;
  for (const float value : check<Kind>(c).whitened) expect_equal(value, 0, "one sample, centred");
}

// Covariance diag(1, 1, 0, 0): a gradient through eigenvectors would divide by zero.
template <typename Kind>
void test_equal_eigenvalues_are_harmless() {
  const Values features = {1, 1, 0, 0, 1, -1, 0, 0, -1, 1, 0, 0, -1, -1, 0, 0};
  check<Kind>({.samples = 4, .groups = 1, .size = 4, .eps = 0.01}, features);
}

template <typename Kind>
void test_two_features_by_hand() {
  // Covariance [[5, 4], [4, 5]], eigenvalues 9 and 1: W has 1/3 along (1, 1), 1 along (1, -1).
  const WhitenCase c{.samples = 4, .groups = 1, .size = 2, .eps = 1e-12};
  const auto found = check<Kind>(c, {10, 10, 4, 4, 8, 6, 6, 8});
  const double expected[] = {2. / 3, -1. / 3, -1. / 3, 2. / 3};
  for (int i = 0; i < 4; ++i) {
    expect(std::abs(found.matrix[i] - expected[i]) < 1e-6, "W by hand");
  }
}

// Rows are whitened with the mean in two floats; the gradient has one, as it is saved in float32.
template <typename Kind>
void test_a_mean_far_above_the_spread_keeps_the_digits() {
  const WhitenCase c{.samples = 50, .groups = 2, .size = 4};
  const MatrixInMemory features(c, random_values(c, 1, 1e5), c.features);
  const MatrixInMemory grad(c, random_values(c, 2), c.grad);
  const auto found = run<Kind>(c, features, grad);
  auto truth = whiten_in_float64(features.values, grad.values, c.samples, c.groups, c.size, c.eps);
  expect_close(
      "gradient, large mean", found.grad_features, truth.grad_features, truth.grad_times_matrix, 1,
      [](size_t) { return 0; }, 0.01);
  truth.grad_features.clear();
  expect_truth(c, truth, found, kAllowed<Kind>);
}

template <typename Kind>
void test_noise_below_zero_is_no_root_of_a_negative() {
  const WhitenCase c{.samples = 4, .groups = 1, .size = 12, .eps = 1e-12};
  const MatrixInMemory features(c, random_values(c, 1), c.features);
  const MatrixInMemory grad(c, random_values(c, 2), c.grad);
  const auto found = run<Kind>(c, features, grad);
  for (const float value : found.whitened) expect(std::isfinite(value), "a finite value");
  for (const float value : found.grad_features) expect(std::isfinite(value), "a finite gradient");
}

template <typename Kind>
void test_scale_does_not_matter() {
  for (const double factor : {1e-15, 1e15}) {
    const WhitenCase c{.samples = 50, .groups = 1, .size = 5, .eps = 0.1 * factor * factor};
    Values features = random_values(c, 1, 2);
    for (double& value : features) value *= factor;
    const MatrixInMemory in(c, features, c.features), grad(c, random_values(c, 2), c.grad);
    const auto found = run<Kind>(c, in, grad);
    const auto truth = whiten_in_float64(in.values, grad.values, c.samples, 1, c.size, c.eps);
    expect_truth(c, truth, found, kAllowed<Kind>);
  }
}

template <typename Kind>
void test_what_is_not_finite_reaches_its_group_alone() {
  const WhitenCase c{.samples = 20, .groups = 3, .size = 4};
  for (const double value : {std::nan(""), double(INFINITY), 3e38}) {
    Values features = random_values(c, 1);
    features[3 * c.columns() + 5] = value;
    const MatrixInMemory in(c, features, c.features), grad(c, random_values(c, 2), c.grad);
    const auto found = run<Kind>(c, in, grad);
    for (int i = 0; i < c.samples * c.columns(); ++i) {
      const bool broken = i % c.columns() / c.size == 1;
      expect(std::isnan(found.whitened[i]) == broken, "NaN in the whole group alone");
      expect(std::isnan(found.grad_features[i]) == broken, "a gradient of NaN there alone");
    }
    for (int i = 0; i < 3 * 16; ++i) {
      expect(std::isnan(found.matrix[i]) == (i / 16 == 1), "a matrix of NaN there alone");
      expect(std::isnan(found.vectors[i]) == (i / 16 == 1), "vectors of NaN there alone");
      expect(std::isnan(found.scale[i / 4]) == (i / 16 == 1), "scales of NaN there alone");
    }
  }
}

template <typename Kind>
void test_without_features_nothing_is_launched() {
  const WhitenCase c{.samples = 3, .groups = 0, .size = 4};
  const MatrixInMemory none(c, {}, c.features);
  expect(run<Kind>(c, none, none).whitened.empty(), "nothing");
}

template <typename Kind>
int test_zca_whiten() {
  test_the_result_is_that_of_float64<Kind>();
  test_many_samples<Kind>();
  test_large_groups<Kind>();
  test_the_largest_group<Kind>();
  test_twenty_schedules_give_the_same_bits<Kind>();
  test_any_layout_gives_the_same_bits<Kind>();
  test_a_gradient_of_stride_zero_is_taken<Kind>();
  test_directions_without_variance_are_harmless<Kind>();
  test_equal_eigenvalues_are_harmless<Kind>();
  test_two_features_by_hand<Kind>();
  test_a_mean_far_above_the_spread_keeps_the_digits<Kind>();
  test_noise_below_zero_is_no_root_of_a_negative<Kind>();
  test_scale_does_not_matter<Kind>();
  test_what_is_not_finite_reaches_its_group_alone<Kind>();
  test_without_features_nothing_is_launched<Kind>();
  return report();
}

}  // namespace medmoco::test
