// What dense_match does with ties, zeros, NaN, and numbers at the ends of their range.

#pragma once

#include "dense_match_check.h"

namespace medmoco::test {

inline void test_matches_are_ordered() {
  const float nan = std::nanf(""), infinity = HUGE_VALF;
  const std::vector<float> scores = {-infinity, -2, -1e-40f, 0, 1e-40f, 0.5f, infinity, nan};
  for (size_t i = 0; i < scores.size(); ++i) {
    for (const uint32_t position : {0u, 5u, 1u << 30}) {
      const uint64_t match = match_of(scores[i], position);
      expect_equal(score_of(match), scores[i], "score");
      expect_equal(double(position_of(match)), position, "position");
      expect(match < match_of(scores[i], position - 1) || position == 0, "the lower position");
      expect(i == 0 || match_of(scores[i - 1], 0) < match, "the higher score");
      expect(match != kIrregular, "kIrregular to be no match");
    }
  }
  expect(match_of(-0.0f, 3) == match_of(0.0f, 3), "-0 to be 0");
  expect(match_of(-nan, 3) == match_of(nan, 3), "any NaN to be the same");
}

// Cases of both sizes of the kernel, one in two tiles of keys after each other, one in parts.
inline std::vector<MatchCase> edge_cases() {
  return {{.batch = 2, .channels = 24, .queries = 30, .keys = 61},
          {.batch = 1, .channels = 24, .queries = 70, .keys = 264},
          {.batch = 1,
           .channels = 24,
           .queries = 20,
           .keys = 300,
           .multiprocessors = 7,
           .query = Lies::kChannelsLast,
           .key = Lies::kChannelsLast}};
}

template <typename Kind>
void expect_index(const MatchCase& c, const MatchVectors& vectors, int query, int64_t index) {
  const auto found = check<Kind>(c, vectors);
  expect_equal(double(found.index[query]), double(index), "index: " + c.text());
}

template <typename Kind>
void test_ties_go_to_the_lowest_position() {
  for (const MatchCase& c : edge_cases()) {
    // The same vector and multiples of it by powers of 2, from anywhere to the last position: in
    // lanes, warps, tiles and parts apart.
    for (const int lowest : {0, 3, 17, 33, c.keys / 2, c.keys - 2}) {
      auto vectors = MatchVectors::random(c);
      for (const int far : {0, 1, 2, 8, 31, 128, 129, 200, 260}) {
        const int position = std::min(lowest + far, c.keys - 1);
        vectors.key.set(0, position, vectors.query.at(0, 5));
        vectors.key.scale(0, position, far % 2 ? 0.25 : 8);
      }
      expect_index<Kind>(c, vectors, 5, lowest);
    }
    auto ones = MatchVectors::random(c);
    std::fill(ones.query.values.begin(), ones.query.values.end(), 1);
    std::fill(ones.key.values.begin(), ones.key.values.end(), 1);
    for (const int64_t index : check<Kind>(c, ones).index) expect_equal(index, 0, "index of ones");
  }
}

template <typename Kind>
void test_a_zero_vector_has_cosine_zero() {
  for (const MatchCase& c : edge_cases()) {
    auto vectors = MatchVectors::random(c);
    vectors.query.scale(0, 3, 0);
    expect_index<Kind>(c, vectors, 3, 0);
    // The best of keys that all point away is the one of zeros, of either sign.
    for (int j = 0; j < c.keys; ++j) {
      vectors.key.set(0, j, vectors.query.at(0, 5));
      vectors.key.scale(0, j, -1.0 - j % 3);
    }
    for (const int zero : {c.keys - 1, c.keys / 2, 2}) {
      vectors.key.scale(0, zero, 0);
      const auto found = check<Kind>(c, vectors);
      expect_equal(double(found.index[5]), zero, "index of the zero vector: " + c.text());
      expect_equal(found.similarity[5], 0, "similarity of the zero vector: " + c.text());
    }
  }
}

template <typename Kind>
void test_the_lowest_nan_wins() {
  for (const MatchCase& c : edge_cases()) {
    for (const double poison : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
      const auto clean = check<Kind>(c);
      auto vectors = MatchVectors::random(c);
      vectors.query.at(0, 7)[c.channels - 1] = poison;
      const auto one = check<Kind>(c, vectors);
      for (int i = 0; i < c.batch * c.queries; ++i) {
        expect(
            i == 7 || (one.index[i] == clean.index[i] && one.similarity[i] == clean.similarity[i]),
            "a NaN in its row alone: " + c.text());
      }
      expect(one.index[7] == 0 && std::isnan(one.similarity[7]), "NaN at 0: " + c.text());
      for (const int key : {c.keys - 1, 50, 21}) {
        vectors.key.at(0, key)[1] = poison;
        expect_index<Kind>(c, vectors, 5, key);
      }
    }
  }
}

// The scales go through all of them, so that short meet long.
template <typename Kind>
void test_lengths_do_not_matter(const std::vector<double>& scales) {
  for (const MatchCase& c : edge_cases()) {
    auto vectors = MatchVectors::random(c);
    int next = 0;
    for (int b = 0; b < c.batch; ++b) {
      for (int i = 0; i < c.queries; ++i) vectors.query.scale(b, i, scales[i % scales.size()]);
      for (int j = 0; j < c.keys; ++j) vectors.key.scale(b, j, scales[next++ % scales.size()]);
    }
    check<Kind>(c, vectors);
  }
}

template <typename Kind>
void test_lengths_do_not_matter() {
  // Of float16: subnormal numbers of a few bits, and the largest.
  if (sizeof(typename Kind::Element) == 2) test_lengths_do_not_matter<Kind>({1e-5, 1, 300, 1e4});
  if (std::is_same_v<Kind, SixteenBit<Half>>) return;
  test_lengths_do_not_matter<Kind>(
      {1e-38, 1e-30, 1e-19, 1e-15, 1e-10, 1, 1e10, 1e15, 3e19, 1e30, 5e37});
  test_lengths_do_not_matter<Kind>({1e-12, 1, 1e12});  // nothing out of the ordinary
  test_lengths_do_not_matter<Kind>({1, 1e-30});        // whose squares vanish
}

template <typename Kind>
void test_similarity_never_leaves_its_range() {
  MatchCase c{.batch = 1, .channels = 50, .queries = 200, .keys = 200};
  auto vectors = MatchVectors::random(c);
  vectors.key = vectors.query;
  check<Kind>(c, vectors);
  c.keys = 1;
  vectors.key = Vectors::random(1, 50, 1, 3);
  for (int i = 0; i < c.queries; ++i) {
    vectors.query.set(0, i, vectors.key.at(0, 0));
    vectors.query.scale(0, i, -1 - i % 7);
  }
  check<Kind>(c, vectors);
}

template <typename Kind>
void test_no_query_launches_nothing() {
  for (const MatchCase& c : {MatchCase{.batch = 0, .channels = 3, .queries = 5, .keys = 5},
                             MatchCase{.batch = 2, .channels = 3, .queries = 0, .keys = 5}}) {
    const auto vectors = MatchVectors::random(c);
    const MatchOperands<typename Kind::Element> operands(c, vectors);
    expect(run<Kind>(c, operands).index.empty(), "no index: " + c.text());
  }
}

template <typename Kind>
void test_one_map_may_serve_all_images() {
  MatchCase c{.batch = 3, .channels = 24, .queries = 33, .keys = 40};
  auto vectors = MatchVectors::random(c);
  for (int image = 1; image < c.batch; ++image) {
    for (int j = 0; j < c.keys; ++j) vectors.key.set(image, j, vectors.key.at(0, j));
  }
  const auto expected = check<Kind>(c, vectors);
  MatchOperands<typename Kind::Element> operands(c, vectors);
  operands.key.map.batch_stride = 0;
  expect(run<Kind>(c, operands).same_bits(expected), "the same bits of an expanded map");
}

}  // namespace medmoco::test
