// Column moments: shapes, number formats, layouts, and columns that are out of the ordinary.

#include "column_moments_check.h"
#include "pairwise.h"

namespace {

using namespace medmoco;
using namespace medmoco::test;

void test_moments_are_those_of_float64() {
  const std::vector<int> rows = {1, 2, 15, 16, 17, 129, 1030, 1700};
  const std::vector<int> columns = {1, 3, 31, 32, 33, 70};
  const std::vector<int> multiprocessors = {1, 2, 5};
  for (const auto& choice :
       pairwise_choices<5>({int(rows.size()), int(columns.size()), int(multiprocessors.size()),
                            kStorages, kLayouts})) {
    const MomentCase c{rows[choice[0]], columns[choice[1]], multiprocessors[choice[2]],
                       Storage(choice[3]), Layout(choice[4])};
    auto values = Values::normal(c.rows, c.columns, uint64_t(c.rows * 100 + c.columns));
    for (int j = 0; j < c.columns; ++j) values.change_column(j, 1 + j % 3, j % 5);
    check_moments(c, values);
  }
}

void test_any_layout_and_schedule_give_the_same_bits() {
  MomentCase c{.rows = 1100, .columns = 40, .multiprocessors = 2};
  const auto values = Values::normal(c.rows, c.columns, 3);
  const auto expected = check_moments(c, values);
  for (int layout = 0; layout < kLayouts; ++layout) {
    c.layout = Layout(layout);
    ++c.seed;
    expect(check_moments(c, values).same_bits(expected), "the same bits: " + c.text());
  }
  c = {.rows = 40, .columns = 3};
  const auto few = Values::normal(c.rows, c.columns, 4);
  const auto expected_of_few = check_moments(c, few);
  for (c.seed = 2; c.seed <= 20; ++c.seed) {
    expect(check_moments(c, few).same_bits(expected_of_few), "the same bits: " + c.text());
  }
}

void test_values_far_from_zero_keep_their_digits() {
  const MomentCase c{.rows = 1500, .columns = 4, .multiprocessors = 2};
  auto values = Values::normal(c.rows, c.columns, 5);
  values.change_column(0, 1, 1e3).change_column(1, 1, 1 << 20).change_column(2, 1e-3, -1e4);
  values.at(0, 3) = 1e6;  // the first value, from which the others count
  check_moments(c, values);
}

void test_a_constant_column_has_no_deviation() {
  for (const int rows : {1, 7, 1500}) {
    const MomentCase c{.rows = rows, .columns = 3, .multiprocessors = 2};
    auto values = Values::normal(c.rows, c.columns, 6);
    values.change_column(1, 0, 0.1);
    const auto found = check_moments(c, values);
    expect_equal(found.mean[1], double(0.1f), "mean of a constant column");
    expect_equal(found.squares[1], 0, "squares of a constant column");
    expect_equal(found.high[1], 0.1f, "higher part of a constant column's mean");
    expect_equal(found.low[1], 0, "lower part of a constant column's mean");
  }
}

void test_nan_and_infinity_stay_in_their_column() {
  const MomentCase c{.rows = 1100, .columns = 40, .multiprocessors = 2};
  const auto values = Values::normal(c.rows, c.columns, 7);
  const auto clean = check_moments(c, values);
  for (const double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    for (const int row : {0, 600, 1099}) {
      auto poisoned = values;
      poisoned.at(row, 33) = poison;
      const StoredMatrix stored(poisoned, c.storage, c.layout);
      MomentResult found(size_t(c.columns));
      run_moments(c, stored, found.out());
      expect(std::isnan(found.squares[33]) && !std::isfinite(found.mean[33]) &&
                 std::isnan(found.high[33] + found.low[33]),
             "no finite moment of a column with " + std::to_string(poison));
      found.mean[33] = clean.mean[33];
      found.squares[33] = clean.squares[33];
      found.high[33] = clean.high[33];
      found.low[33] = clean.low[33];
      expect(found.same_bits(clean), "the other columns to stay as they are");
    }
  }
}

void test_what_is_not_wanted_is_not_written() {
  const MomentCase c{.rows = 20, .columns = 5};
  const StoredMatrix stored(Values::normal(c.rows, c.columns, 8), c.storage, c.layout);
  MomentResult all(size_t(c.columns)), one(size_t(c.columns));
  run_moments(c, stored, all.out());
  run_moments(
      c, stored,
      {.mean = nullptr, .mean_high = nullptr, .mean_low = nullptr, .squares = one.squares.data()});
  expect(one.squares == all.squares, "squares alone");
  run_moments(
      c, stored,
      {.mean = one.mean.data(), .mean_high = nullptr, .mean_low = nullptr, .squares = nullptr});
  expect(one.mean == all.mean, "the mean alone");
}

void test_no_columns_launch_nothing() {
  const MomentCase c{.rows = 5, .columns = 0};
  const StoredMatrix stored(Values(5, 0), c.storage, c.layout);
  run_moments(c, stored, {});
}

}  // namespace

int main() {
  test_moments_are_those_of_float64();
  test_any_layout_and_schedule_give_the_same_bits();
  test_values_far_from_zero_keep_their_digits();
  test_a_constant_column_has_no_deviation();
  test_nan_and_infinity_stay_in_their_column();
  test_what_is_not_wanted_is_not_written();
  test_no_columns_launch_nothing();
  return report();
}
