// What queue_info_nce does at the edges of its domain, for every kind of operand.

#pragma once

#include <cmath>
#include <vector>

#include "queue_info_nce_check.h"

namespace medmoco::test {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// What the rounding of a weight does to it, relative.
template <typename Kind>
constexpr double kWeightError = Kind::kPrecise ? 0x1p-20 : 0x1p-11;
template <>
constexpr double kWeightError<SixteenBit<BFloat16>> = 0x1p-9;

inline std::vector<double> repeated(const std::vector<double>& row, int count) {
  std::vector<double> rows;
  for (int i = 0; i < count; ++i) rows.insert(rows.end(), row.begin(), row.end());
  return rows;
}

inline void expect_near(double actual, double expected, double relative, const std::string& what,
                        std::source_location where = std::source_location::current()) {
  expect(std::abs(actual - expected) <= relative * std::abs(expected),
         what + " " + std::to_string(expected) + ", got " + std::to_string(actual), where);
}

template <typename Kind>
void test_an_empty_queue_gives_no_loss() {
  const Case c{.batch = 70, .queue_size = 0, .embed_dim = 9};
  const auto found = run<Kind>(c, random_operands<Kind>(c));
  for (int i = 0; i < c.batch; ++i) {
    expect_equal(found.loss[i], 0, "loss");
    expect_equal(found.rank[i], 0, "rank");
  }
  for (const float value : found.direction) expect_equal(value, 0, "direction");
}

template <typename Kind>
void test_rows_without_columns_all_score_alike() {
  const Case c{.batch = 3, .queue_size = 70, .embed_dim = 0};
  const auto found = run<Kind>(c, random_operands<Kind>(c));
  expect_near(found.loss[2], std::log(71.0), 1e-6, "a loss of");
  expect_equal(found.rank[2], 70, "rank");
}

template <typename Kind>
void test_a_query_whose_negatives_are_all_left_out_has_no_loss() {
  const Case c{.batch = 3, .queue_size = 100, .embed_dim = 8, .ids = true};
  auto operands = random_operands<Kind>(c);
  operands.query_ids = {{4, 5, 4}, c.layout};
  operands.queue_ids = {std::vector<int64_t>(100, 4), c.layout};
  const auto found = run<Kind>(c, operands);
  for (const int row : {0, 2}) {
    expect_equal(found.loss[row], 0, "loss");
    expect_equal(found.rank[row], 0, "rank");
    for (int d = 0; d < 8; ++d) expect_equal(found.direction[row * 8 + d], 0, "direction");
  }
  expect(found.loss[1] > 0 && found.direction[8] != 0, "a loss where another id is left out");
}

// Of a query of zeros all logits are 0, so loss and rank tell how many keys count.
template <typename Kind>
void test_ids_match_in_all_64_bits_and_negative_ones_match_nothing() {
  constexpr int64_t kUpper = int64_t(1) << 32;
  const Case c{.batch = 3, .queue_size = 6, .embed_dim = 5, .ids = true};
  auto operands = Operands<typename Kind::Element>::of(
      c, std::vector<double>(15), std::vector<double>(15, 1.0), std::vector<double>(30, 1.0));
  operands.query_ids = {{kUpper + 1, -1, 1 - kUpper}, Layout::kApart};
  operands.queue_ids = {{1, kUpper + 1, 2 * kUpper + 1, -1, 1 - kUpper, kUpper + 1},
                        Layout::kApart};
  const auto found = run<Kind>(c, operands);
  const int count[] = {4, 6, 6};
  for (int i = 0; i < 3; ++i) {
    expect_equal(found.rank[i], count[i], "rank");
    expect_near(found.loss[i], std::log(count[i] + 1.0), 1e-6, "a loss of");
  }
}

// In a tile of the queue that is full: at its end every entry is looked at.
template <typename Kind>
void test_a_single_entry_with_the_id_of_a_query_is_left_out() {
  const Case c{.batch = 40, .queue_size = 100, .embed_dim = 5, .ids = true};
  for (const int query : {3, 11, 19, 27}) {
    auto operands = Operands<typename Kind::Element>::of(
        c, std::vector<double>(200), std::vector<double>(200, 1.0), std::vector<double>(500, 1.0));
    std::vector<int64_t> query_ids(40, 1), queue_ids(100, 2);
    query_ids[query] = queue_ids[20 + query] = 3;
    operands.query_ids = {query_ids, c.layout};
    operands.queue_ids = {queue_ids, c.layout};
    const auto found = run<Kind>(c, operands);
    for (int i = 0; i < 40; ++i) expect_equal(found.rank[i], i == query ? 99 : 100, "rank");
  }
}

template <typename Kind>
void test_nan_in_a_query_or_key_stays_in_its_row() {
  const Case c{.batch = 40, .queue_size = 70, .embed_dim = 8, .multiprocessors = 2};
  const auto clean = random_operands<Kind>(c);
  auto query = clean.query.values, key = clean.key.values;
  query[3 * 8 + 2] = kNan;
  key[35 * 8] = kNan;
  const auto expected = run<Kind>(c, clean);
  const auto found =
      run<Kind>(c, Operands<typename Kind::Element>::of(c, query, key, clean.queue.values));
  for (int i = 0; i < c.batch; ++i) {
    const bool touched = i == 3 || i == 35;
    expect_equal(found.loss[i], touched ? kNan : expected.loss[i], "loss");
    expect_equal(found.rank[i], touched ? 70 : expected.rank[i], "rank");
    for (int d = i * 8; d < i * 8 + 8; ++d) {
      expect_equal(found.direction[d], touched ? kNan : expected.direction[d], "direction");
    }
  }
}

template <typename Kind>
void test_nan_in_the_queue_reaches_the_loss_of_all_rows_that_keep_it() {
  Case c{.batch = 3, .queue_size = 70, .embed_dim = 8};
  const auto clean = random_operands<Kind>(c);
  auto queue = clean.queue.values;
  for (int d = 0; d < 8; ++d) queue[66 * 8 + d] = kNan;
  auto operands =
      Operands<typename Kind::Element>::of(c, clean.query.values, clean.key.values, queue);
  const auto found = run<Kind>(c, operands);
  for (int i = 0; i < 3; ++i) {
    expect_equal(found.loss[i], kNan, "loss");
    expect(found.rank[i] >= 1, "a NaN to count as not below the key");
  }
  c.ids = true;
  operands.query_ids = {{1, 2, 2}, c.layout};
  std::vector<int64_t> ids(70, -1);
  ids[66] = 1;
  operands.queue_ids = {ids, c.layout};
  const auto spared = run<Kind>(c, operands);
  for (int i = 0; i < 3; ++i) {
    expect(std::isnan(spared.loss[i]) == (i > 0), "NaN where the id does not leave it out");
  }
}

template <typename Kind>
void test_a_nan_key_gives_the_rank_of_what_counts() {
  const Case c{.batch = 1, .queue_size = 70, .embed_dim = 2, .ids = true};
  auto operands = Operands<typename Kind::Element>::of(c, {1, 0}, {kNan, 0}, repeated({1, 0}, 70));
  operands.query_ids = {{3}, c.layout};
  std::vector<int64_t> ids(70, 1);
  ids[5] = ids[68] = 3;
  operands.queue_ids = {ids, c.layout};
  expect_equal(run<Kind>(c, operands).rank[0], 68, "rank");
}

// In powers of 2 the largest logit is 14427, with a last place of 2^-10: its weight is 1 only to
// that. 16-bit weights are rounded after they have been added up, so the mean may be off by that.
template <typename Kind>
void test_logits_of_ten_thousand_neither_overflow_nor_vanish() {
  const Case c{.batch = 4, .queue_size = 3, .embed_dim = 2, .temperature = 0.01f};
  const auto operands = Operands<typename Kind::Element>::of(
      c, {100, 0, 100, 0, -100, 0, 0, 100}, {1, 0, -1, 0, -1, 0, 0, 1}, {1, 0, -1, 0, 0, 0.5});
  const auto found = run<Kind>(c, operands);
  for (int i = 0; i < 4; ++i) {
    const Truth truth = truth_of_row<Kind>(c, operands, i);
    expect_near(found.loss[i], truth.loss, 1e-6, "a loss of");
    for (int d = 0; d < 2; ++d) {
      expect(std::abs(found.direction[2 * i + d] - truth.direction[d]) <= 100 * kWeightError<Kind>,
             "a direction of " + std::to_string(truth.direction[d]) + ", got " +
                 std::to_string(found.direction[2 * i + d]));
    }
  }
}

template <typename Kind>
void test_a_loss_far_below_one_keeps_its_digits() {
  const Case c{.batch = 1, .queue_size = 1, .embed_dim = 1, .temperature = 0.1f};
  const auto found = run<Kind>(c, Operands<typename Kind::Element>::of(c, {1}, {1}, {-1}));
  expect_near(found.loss[0], std::exp(-20.0), 1e-5, "a loss of");
}

template <typename Kind>
void test_duplicates_of_the_key_each_count() {
  for (const int embed_dim : {24, 77, 200}) {
    for (const int copies : {1, 100, 300}) {
      const Case c{.batch = 30, .queue_size = copies, .embed_dim = embed_dim, .multiprocessors = 2};
      const auto random = random_operands<Kind>(c);
      for (const int i : {0, 13, 29}) {
        const std::vector<double> key(random.key.row(i), random.key.row(i) + embed_dim);
        const auto found =
            run<Kind>(c, Operands<typename Kind::Element>::of(
                             c, random.query.values, random.key.values, repeated(key, copies)));
        expect_equal(found.rank[i], copies, "rank: none scores below the key");
        expect_near(found.loss[i], std::log(copies + 1.0), 4e-6, "a loss of");
        if (embed_dim > 24 && i == 0)
          break;  // the last columns of the last row: one width is enough
      }
    }
  }
}

template <typename Kind>
void test_a_collapsed_encoder_never_scores_a_hit() {
  const Case c{.batch = 5, .queue_size = 130, .embed_dim = 8};
  const auto random = random_operands<Kind>(c);
  const auto zero =
      run<Kind>(c, Operands<typename Kind::Element>::of(c, std::vector<double>(40),
                                                        random.key.values, random.queue.values));
  const std::vector<double> row(random.query.row(0), random.query.row(0) + 8);
  const auto same = run<Kind>(c, Operands<typename Kind::Element>::of(
                                     c, repeated(row, 5), repeated(row, 5), repeated(row, 130)));
  for (int i = 0; i < 5; ++i) {
    expect_equal(zero.rank[i], 130, "rank of a query of zeros");
    expect_equal(same.rank[i], 130, "rank where all rows are the same");
  }
}

// Weights of about 2^-18 next to one of 1. float16 has 6 bits left there, unless the kernel holds
// weights higher; the first column differs a little from 1 - 18 ln 2 / 32, so that rounding to
// these 6 bits is wrong by half of the last.
template <typename Kind>
void test_weights_far_below_the_largest_keep_their_digits() {
  const double column = 1 - (18 - std::log2(64.5 / 64)) * std::log(2.0) * 0.03125;
  for (const bool rising : {false, true}) {
    const Case c{.batch = 1, .queue_size = 200, .embed_dim = 8, .temperature = 0.03125f};
    auto queue = repeated({column, 1, 0, 0, 0, 0, 0, 0}, 200);
    const int largest = rising ? 199 : 0;
    queue[largest * 8] = 1;
    queue[largest * 8 + 1] = 0;
    const auto operands = Operands<typename Kind::Element>::of(c, {1, 0, 0, 0, 0, 0, 0, 0},
                                                               {1, 0, 0, 0, 0, 0, 0, 0}, queue);
    const Truth truth = truth_of_row<Kind>(c, operands, 0);
    expect_near(run<Kind>(c, operands).direction[1], truth.direction[1], 1.2 * kWeightError<Kind>,
                "a direction of");
  }
}

// The largest logit grows, or falls, from tile to tile by `step` powers of 2.
template <typename Kind>
void test_a_peak_that_moves_from_tile_to_tile() {
  for (const double step : {3.0, 5.0, 12.0, -3.0, -12.0}) {
    const Case c{.batch = 20, .queue_size = 64 * 9, .embed_dim = 16, .temperature = 1};
    auto [query, key, queue, query_ids, queue_ids] = random_operands<Kind>(c);
    for (int i = 0; i < c.batch; ++i) query.values[i * 16] = key.values[i * 16] = 1;
    for (int j = 0; j < c.queue_size; ++j) {
      queue.values[j * 16] = as_operand<Kind>((j / 64 - 4) * step * std::log(2.0));
    }
    check<Kind>(c, Operands<typename Kind::Element>::of(c, query.values, key.values, queue.values));
  }
}

// Truncation, or a part of the operands that nobody rounds, would give other bits. Keys of zero:
// the loss takes query . key as it is.
inline void test_tf32_operands_are_rounded_to_nearest() {
  const Case c{.batch = 20, .queue_size = 100, .embed_dim = 40};
  auto without_keys = [&](const Operands<float>& o) {
    const std::vector<double> zeros(o.key.values.size(), 0.0);
    return run<Tf32>(c, Operands<float>::of(c, o.query.values, zeros, o.queue.values));
  };
  const auto found = without_keys(random_operands<Tf32x3>(c));
  const auto expected = without_keys(random_operands<Tf32>(c));
  expect(found.loss == expected.loss && found.rank == expected.rank,
         "the loss of operands that have been rounded before");
}

template <typename Kind>
void test_edges() {
  test_an_empty_queue_gives_no_loss<Kind>();
  test_rows_without_columns_all_score_alike<Kind>();
  test_a_query_whose_negatives_are_all_left_out_has_no_loss<Kind>();
  test_ids_match_in_all_64_bits_and_negative_ones_match_nothing<Kind>();
  test_a_single_entry_with_the_id_of_a_query_is_left_out<Kind>();
  test_nan_in_a_query_or_key_stays_in_its_row<Kind>();
  test_nan_in_the_queue_reaches_the_loss_of_all_rows_that_keep_it<Kind>();
  test_a_nan_key_gives_the_rank_of_what_counts<Kind>();
  test_logits_of_ten_thousand_neither_overflow_nor_vanish<Kind>();
  test_a_loss_far_below_one_keeps_its_digits<Kind>();
  test_duplicates_of_the_key_each_count<Kind>();
  test_a_collapsed_encoder_never_scores_a_hit<Kind>();
  test_weights_far_below_the_largest_keep_their_digits<Kind>();
  test_a_peak_that_moves_from_tile_to_tile<Kind>();
}

}  // namespace medmoco::test
