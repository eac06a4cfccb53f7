// The eigensolver of small matrices by itself.

#include "eigh_case.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

void test_all_sizes() {
  for (const int size : {1, 2, 3, 5, 16, 17, 64}) {
    decompose_and_check("random", size, covariance(size, 2 * size + 2));
  }
}

void test_the_largest_size() { decompose_and_check("random", 128, covariance(128, 1000)); }

void test_equal_and_missing_eigenvalues() {
  for (const int size : {2, 5, 16}) {
    const std::vector<float> ones(size * size, 1.0f);
    decompose_and_check("rank one", size, ones);
    decompose_and_check("few samples", size, covariance(size, size / 2));
    decompose_and_check("duplicate columns", size, covariance(size, 3 * size, 1, {}, true));
    decompose_and_check("zero", size, std::vector<float>(size * size));
  }
}

void test_a_diagonal_matrix_is_left_as_it_is() {
  constexpr int kSize = 6;
  std::vector<float> matrix(kSize * kSize);
  for (int i = 0; i < kSize; ++i) matrix[i * (kSize + 1)] = float(i % 4);
  const Found found = decompose_and_check("diagonal", kSize, matrix);
  for (int i = 0; i < kSize; ++i) expect_equal(found.values[i], i % 4, "an eigenvalue");
}

void test_a_quiet_last_round_does_not_end_it() { decompose_and_check("early", 8, early_pairs()); }

void test_two_by_two_by_hand() {
  const Found found = decompose_and_check("by hand", 2, {5, 4, 4, 5});
  const auto [least, most] = std::minmax(found.values[0], found.values[1]);
  expect(std::abs(least - 1) < 1e-6 && std::abs(most - 9) < 1e-6, "eigenvalues 1 and 9");
}

// Features of very different spread keep the digits of the small ones: what couples them is small
// beside both.
void test_small_variances_keep_their_digits() {
  const std::vector<float> matrix = {1e6f, 1e-1f, 1e-2f, 1e-1f, 1, 1e-7f, 1e-2f, 1e-7f, 1e-6f};
  Found found = decompose_and_check("of very different spread", 3, matrix);
  std::sort(found.values.begin(), found.values.end());
  // 1e-6 less 1e-2^2 / 1e6, and 1 less 1e-1^2 / 1e6.
  expect(std::abs(found.values[0] - (1e-6 - 1e-10)) < 4e-13, "the least eigenvalue");
  expect(std::abs(found.values[1] - 1) < 4e-7, "the second eigenvalue");
}

void test_condition_and_scale_do_not_matter() {
  decompose_and_check("near the largest float", 2, {2e38f, 1e38f, 1e38f, 2e38f});
  constexpr int kSize = 12;
  std::vector<double> deviations;
  for (int i = 0; i < kSize; ++i) deviations.push_back(std::pow(10, -3.0 * i / (kSize - 1)));
  decompose_and_check("condition 1e6", kSize, covariance(kSize, 40, 1, deviations));
  for (const double factor : {1e-44, 1e-30, 1e30}) {
    const auto matrix = covariance(kSize, 40, factor);
    const Found found = decompose(kSize, matrix);
    expect(found.found, "eigenvalues at any scale");
    if (factor > 1e-40) expect_decomposed("scaled", kSize, matrix, found);
  }
}

void test_twenty_schedules_give_the_same_bits() {
  const auto matrix = covariance(9, 30);
  const Found expected = decompose(9, matrix);
  for (uint64_t seed = 2; seed <= 20; ++seed) {
    const Found found = decompose(9, matrix, kMostSweeps, seed);
    expect(found.values == expected.values && found.vectors == expected.vectors, "the same bits");
  }
}

void test_too_few_sweeps_are_told() {
  const auto matrix = covariance(16, 40);
  expect(!decompose(16, matrix, 2).found, "no eigenvalues after two sweeps");
  expect(decompose(16, matrix, 12).found, "eigenvalues after a dozen");
}

}  // namespace

int main() {
  test_all_sizes();
  test_the_largest_size();
  test_equal_and_missing_eigenvalues();
  test_a_diagonal_matrix_is_left_as_it_is();
  test_a_quiet_last_round_does_not_end_it();
  test_two_by_two_by_hand();
  test_small_variances_keep_their_digits();
  test_condition_and_scale_do_not_matter();
  test_twenty_schedules_give_the_same_bits();
  test_too_few_sweeps_are_told();
  return report();
}
