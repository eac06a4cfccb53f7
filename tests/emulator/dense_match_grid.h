// The cases on which every kind of operand is compared with float64, and what must not change the
// result by a bit.

#pragma once

#include "dense_match_check.h"
#include "pairwise.h"

namespace medmoco::test {

inline const std::vector<int> kBatches = {1, 2, 5};
inline const std::vector<int> kChannels = {1, 3, 8, 17, 63, 64, 65, 127, 136, 257, 320};
inline const std::vector<int> kQueries = {1, 7, 32, 49, 64, 65, 128, 130, 200};
inline const std::vector<int> kKeys = {1, 5, 40, 49, 64, 65, 127, 128, 129, 264, 300};
inline const std::vector<int> kMultiprocessors = {1, 2, 3, 7};
constexpr int kLayouts = 6;

inline std::vector<MatchCase> match_grid() {
  std::vector<MatchCase> cases;
  for (const auto& choice :
       pairwise_choices<7>({int(kBatches.size()), int(kChannels.size()), int(kQueries.size()),
                            int(kKeys.size()), int(kMultiprocessors.size()), kLayouts, kLayouts})) {
    cases.push_back({kBatches[choice[0]], kChannels[choice[1]], kQueries[choice[2]],
                     kKeys[choice[3]], kMultiprocessors[choice[4]], Lies(choice[5]),
                     Lies(choice[6]), cases.size() + 1});
  }
  return cases;
}

template <typename Kind>
void test_the_result_is_that_of_float64() {
  for (const MatchCase& c : match_grid()) check<Kind>(c);
}

template <typename Kind>
void test_many_channels() {
  check<Kind>({.batch = 2, .channels = 2048, .queries = 49, .keys = 49});
  check<Kind>({.batch = 1,
               .channels = 4096,
               .queries = 16,
               .keys = 24,
               .query = Lies::kChannelsLast,
               .key = Lies::kChannelsLast});
}

template <typename Kind>
void test_twenty_schedules_give_the_same_bits() {
  for (MatchCase c :
       {MatchCase{.batch = 2, .channels = 70, .queries = 49, .keys = 50},
        MatchCase{.batch = 1, .channels = 136, .queries = 72, .keys = 200, .multiprocessors = 2}}) {
    const auto vectors = MatchVectors::random(c);
    const auto expected = check<Kind>(c, vectors);
    for (c.seed = 2; c.seed <= 20; ++c.seed) expect_same_bits<Kind>(c, vectors, expected);
  }
}

template <typename Kind>
void test_any_split_gives_the_same_bits() {
  MatchCase c{.batch = 3, .channels = 20, .queries = 140, .keys = 520};
  const auto vectors = MatchVectors::random(c);
  const auto expected = check<Kind>(c, vectors);
  for (c.multiprocessors = 2; c.multiprocessors <= 7; ++c.multiprocessors) {
    expect_same_bits<Kind>(c, vectors, expected);
  }
}

template <typename Kind>
void test_any_layout_gives_the_same_bits() {
  for (MatchCase c : {MatchCase{.batch = 2, .channels = 24, .queries = 40, .keys = 48},
                      MatchCase{.batch = 1, .channels = 83, .queries = 49, .keys = 56},
                      MatchCase{.batch = 2, .channels = 72, .queries = 128, .keys = 136}}) {
    const auto vectors = MatchVectors::random(c);
    const auto expected = check<Kind>(c, vectors);
    for (int query = 0; query < kLayouts; ++query) {
      for (const int key : {query, (query + 1) % kLayouts}) {
        c.query = Lies(query);
        c.key = Lies(key);
        expect_same_bits<Kind>(c, vectors, expected);
      }
    }
  }
}

// Beside the parts, which take 16 bytes a query.
template <typename Kind>
void test_maps_that_lie_well_are_not_copied() {
  for (const Lies lies : {Lies::kChannelsFirst, Lies::kChannelsLast, Lies::kOddStart,
                          Lies::kRowsApart, Lies::kChannelsApart, Lies::kEveryOther}) {
    for (const int queries : {49, 200}) {
      MatchCase c{.batch = 1, .channels = 64, .queries = queries, .keys = 48};
      c.query = c.key = lies;
      const MatchOperands<typename Kind::Element> operands(c, MatchVectors::random(c));
      int64_t bytes = 0;
      run<Kind>(c, operands, &bytes);
      const bool copied = bytes > 16 * 256 * 3;
      expect(copied == (lies == Lies::kEveryOther),
             "a copy of maps with gaps alone, got " + std::to_string(bytes) + ": " + c.text());
    }
  }
}

}  // namespace medmoco::test
