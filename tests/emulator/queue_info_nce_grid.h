// The cases on which every kind of operand is compared with float64, and what must not change the
// result by a bit.

#pragma once

#include <vector>

#include "pairwise.h"
#include "queue_info_nce_check.h"

namespace medmoco::test {

inline const std::vector<int> kBatches = {1, 7, 63, 64, 65, 127, 128, 129, 200};
inline const std::vector<int> kQueueSizes = {0, 1, 5, 31, 32, 33, 63, 64, 65, 300, 1025};
inline const std::vector<int> kEmbedDims = {1, 3, 8, 17, 64, 65, 100, 127, 128, 129, 200, 256};
inline const std::vector<float> kTemperatures = {0.2f, 0.07f, 0.01f, 5.0f};
inline const std::vector<int> kMultiprocessors = {1, 2, 3, 7};
constexpr int kLayouts = 4;

inline Case case_of(const Choice<8>& choice, uint64_t seed) {
  return {kBatches[choice[0]],         kQueueSizes[choice[1]], kEmbedDims[choice[2]],
          kTemperatures[choice[3]],    choice[4] == 1,         choice[5] == 1,
          kMultiprocessors[choice[6]], Layout(choice[7]),      seed};
}

inline std::vector<Case> pairwise_grid() {
  std::vector<Case> cases;
  for (const auto& choice : pairwise_choices<8>({int(kBatches.size()), int(kQueueSizes.size()),
                                                 int(kEmbedDims.size()), int(kTemperatures.size()),
                                                 2, 2, int(kMultiprocessors.size()), kLayouts})) {
    cases.push_back(case_of(choice, cases.size() + 1));
  }
  return cases;
}

template <typename Kind>
void test_the_result_is_that_of_float64() {
  for (const Case& c : pairwise_grid()) check<Kind>(c);
}

// As much of the queue that the errors were measured with as takes a few seconds. Three times these
// are allowed.
template <typename Kind>
void test_a_long_queue_errs_no_more_than_was_measured() {
  for (const float temperature : {0.2f, 0.07f}) {
    const Case c{.batch = 16,
                 .queue_size = Kind::kPrecise ? 4096 : 8192,
                 .embed_dim = 128,
                 .temperature = temperature,
                 .multiprocessors = 2};
    const Errors measured = measured_errors<Kind>(temperature);
    check<Kind>(c, random_operands<Kind>(c), {3 * measured.loss, 3 * measured.direction});
  }
}

template <typename Kind>
void expect_same_bits(const Case& c, const Result& expected,
                      std::source_location where = std::source_location::current()) {
  try {
    const auto found = run<Kind>(c, random_operands<Kind>(c));
    expect(found.same_bits(expected), "the same bits: " + c.text(), where);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), where);
  }
}

template <typename Kind>
void test_twenty_schedules_give_the_same_bits() {
  for (Case c : {Case{.batch = 70, .queue_size = 150, .embed_dim = 20, .ids = true},
                 Case{.batch = 5, .queue_size = 300, .embed_dim = 70, .multiprocessors = 3}}) {
    const auto expected = run<Kind>(c, random_operands<Kind>(c));
    check<Kind>(c);
    for (c.seed = 2; c.seed <= 20; ++c.seed) expect_same_bits<Kind>(c, expected);
  }
}

template <typename Kind>
void test_any_layout_gives_the_same_bits() {
  for (const int embed_dim : {24, 77, 160}) {
    Case c{.batch = 9, .queue_size = 40, .embed_dim = embed_dim, .ids = true};
    const auto expected = run<Kind>(c, random_operands<Kind>(c));
    for (const auto layout : {Layout::kApart, Layout::kMisaligned, Layout::kTransposed}) {
      c.layout = layout;
      expect_same_bits<Kind>(c, expected);
    }
  }
}

}  // namespace medmoco::test
