// All tests of covariance_loss with one kind of arithmetic. Each kind is a program of its own, so
// that they build side by side.

#pragma once

#include "covariance_loss_check.h"
#include "pairwise.h"

namespace medmoco::test {

// Both forms, and where they meet; tiles and panels of which the last is not full.
inline const std::vector<int> kSamples = {2, 3, 17, 33, 64, 65, 100, 131};
inline const std::vector<int> kDims = {1, 2, 16, 17, 40, 65, 100, 129, 200};
inline const std::vector<int> kMultiprocessors = {1, 3, 7};

template <typename Kind>
void test_the_result_is_that_of_float64() {
  uint64_t seed = 0;
  for (const auto& choice :
       pairwise_choices<6>({int(kSamples.size()), int(kDims.size()), int(kMultiprocessors.size()),
                            kStorages, kLayouts, kLayouts})) {
    check<Kind>({kSamples[choice[0]], kDims[choice[1]], kMultiprocessors[choice[2]],
                 Storage(choice[3]), Layout(choice[4]), Layout(choice[5]), 0.7f, ++seed});
  }
  for (const int samples : {5, 16, 20}) {
    for (const int more : {-1, 0, 1}) check<Kind>({.samples = samples, .dims = samples + more});
  }
}

// With tiles of the larger size.
template <typename Kind>
void test_many_dims() {
  check<Kind>({.samples = 40, .dims = 530, .multiprocessors = 2});
  check<Kind>({.samples = 530, .dims = 70});
}

template <typename Kind>
void test_any_schedule_and_layout_give_the_same_bits() {
  for (CovarianceCase c : {CovarianceCase{.samples = 40, .dims = 30, .multiprocessors = 2},
                           CovarianceCase{.samples = 30, .dims = 40, .multiprocessors = 2}}) {
    const auto expected = check<Kind>(c);
    for (c.seed = 2; c.seed <= 20; ++c.seed) {
      c.layout = Layout(c.seed % kLayouts);
      c.matrix_layout = Layout(c.seed / 2 % kLayouts);
      expect(check<Kind>(c).same_bits(expected), "the same bits: " + c.text());
    }
  }
}

// Both forms.
inline std::vector<CovarianceCase> edge_cases() {
  return {{.samples = 60, .dims = 40, .multiprocessors = 2},
          {.samples = 40, .dims = 60, .multiprocessors = 2}};
}

// To at most 1e-6 in float32, where subtracting the diagonal would err by 1e-4.
template <typename Kind>
void test_a_few_dominant_columns_cost_no_digits() {
  for (const CovarianceCase& c : edge_cases()) {
    for (const int dominant : {1, 2, 8}) {
      auto values = c.normal();
      for (int j = 5; j < c.dims; j += c.dims / dominant) values.change_column(j, 300);
      check<Kind>(c, values, kAllowed<Kind> / 3);
    }
  }
}

template <typename Kind>
void test_a_mean_far_from_zero_costs_no_digits() {
  for (const CovarianceCase& c : edge_cases()) {
    auto values = c.normal();
    for (int j = 0; j < c.dims; ++j) values.change_column(j, 1, 1e3);
    check<Kind>(c, values);
    for (int j = 0; j < c.dims; ++j) values.change_column(j, 1, 1 << 20);  // to multiples of 1 / 8
    check<Kind>(c, values);
  }
}

template <typename Kind>
void test_constant_columns_get_no_gradient() {
  for (const CovarianceCase& c : edge_cases()) {
    auto values = c.normal();
    for (int j = 0; j < c.dims; j += 2) values.change_column(j, 0, 0.1);
    const auto found = check<Kind>(c, values);
    for (int i = 0; i < c.samples; ++i) {
      for (int j = 0; j < c.dims; j += 2) {
        expect_equal(found.gradient.at(i, j), 0, "gradient of a constant column: " + c.text());
      }
    }
    for (int j = 0; j < c.dims; ++j) values.change_column(j, 0, 0.1 * j);
    expect_equal(check<Kind>(c, values).loss, 0, "loss of constant columns: " + c.text());
  }
}

template <typename Kind>
void test_equal_columns_are_no_ambiguity() {
  for (const CovarianceCase& c : edge_cases()) {
    auto values = c.normal();
    for (int i = 0; i < c.samples; ++i) {
      for (int j = 1; j < c.dims; ++j) values.at(i, j) = values.at(i, 0);
    }
    check<Kind>(c, values);
  }
}

template <typename Kind>
void test_nan_and_infinity_give_nan() {
  for (const CovarianceCase& c :
       {CovarianceCase{.samples = 6, .dims = 4}, CovarianceCase{.samples = 3, .dims = 10},
        CovarianceCase{.samples = 3, .dims = 40}}) {
    for (const double poison : {std::nan(""), HUGE_VAL}) {
      auto values = c.normal();
      values.at(1, 2) = poison;
      const auto found = run<Kind>(c, StoredMatrix(values, c.storage, c.layout));
      expect(std::isnan(found.loss), "NaN of the loss: " + c.text());
      for (const double gradient : found.gradient.data) {
        expect(std::isnan(gradient), "NaN of the gradient: " + c.text());
      }
    }
  }
}

// In the primal form the covariance, in the Gram form products of samples without the columns of
// largest variance.
template <typename Kind>
void test_the_matrix_is_the_smaller_one_and_symmetric() {
  for (const CovarianceCase& c : edge_cases()) {
    auto values = c.normal();
    for (int j = 0; j < kDirectColumns; ++j) values.change_column(j * 2, 10);
    const StoredMatrix stored(values, c.storage, c.layout);
    const auto found = run<Kind>(c, stored);
    const CovarianceTruth truth(stored.values, 1);
    const int side = found.matrix.rows;
    Values expected(side, side);
    for (int i = 0; i < side; ++i) {
      for (int j = 0; j < side; ++j) {
        double product = truth.covariance.at(i, j);
        if (c.samples < c.dims) {
          product = 0;
          for (int k = 0; k < c.dims; ++k) {
            const bool direct = k % 2 == 0 && k < 2 * kDirectColumns;
            if (!direct) product += truth.centred.at(i, k) * truth.centred.at(j, k);
          }
          product /= c.samples - 1;
        }
        expected.at(i, j) = product;
        expect_equal(found.matrix.at(i, j), found.matrix.at(j, i), "mirror image: " + c.text());
      }
    }
    expect(difference(found.matrix, expected) <= kAllowed<Kind> * largest(expected),
           "the matrix: " + c.text());
    for (int j = 0; j < c.dims; ++j) {
      const double mean = stored.values.at(0, j) - truth.centred.at(0, j);
      expect(std::abs(found.mean[j] - mean) < 1e-12, "the mean: " + c.text());
    }
  }
}

template <typename Kind>
void test_no_dims_have_no_mean_over_them() {
  const CovarianceCase c{.samples = 5, .dims = 0};
  const auto found = run<Kind>(c, StoredMatrix(Values(5, 0), c.storage, c.layout));
  expect(std::isnan(found.loss), "NaN");
}

template <typename Kind>
int test_covariance_loss() {
  test_the_result_is_that_of_float64<Kind>();
  test_many_dims<Kind>();
  test_any_schedule_and_layout_give_the_same_bits<Kind>();
  test_a_few_dominant_columns_cost_no_digits<Kind>();
  test_a_mean_far_from_zero_costs_no_digits<Kind>();
  test_constant_columns_get_no_gradient<Kind>();
  test_equal_columns_are_no_ambiguity<Kind>();
  test_nan_and_infinity_give_nan<Kind>();
  test_the_matrix_is_the_smaller_one_and_symmetric<Kind>();
  test_no_dims_have_no_mean_over_them<Kind>();
  return report();
}

}  // namespace medmoco::test
