// dense_match on the emulator against its formula in float64.

#pragma once

#include "dense_match_case.h"
#include "expect.h"

namespace medmoco::test {

// What a cosine may err by.
template <typename Kind>
constexpr double kAllowed = 1e-6;
template <>
constexpr double kAllowed<Tf32> = 1e-3;

inline double dot(const double* a, const double* b, int count) {
  double sum = 0;  // the largest and the smallest floats fit, squared
  for (int c = 0; c < count; ++c) sum += a[c] * b[c];
  return sum;
}

template <typename Element>
std::vector<double> cosines_of(const MatchOperands<Element>& operands, int image, int query) {
  const double* vector = operands.query.vector(image, query);
  const int channels = operands.query.channels;
  const double square = dot(vector, vector, channels);
  std::vector<double> cosines;
  for (int j = 0; j < operands.key.positions; ++j) {
    const double* key = operands.key.vector(image, j);
    const double squares = square * dot(key, key, channels);  // of both
    const double product = dot(vector, key, channels);
    cosines.push_back(squares == 0             ? product
                      : std::isfinite(squares) ? product / std::sqrt(squares)
                                               : std::nan(""));
  }
  return cosines;
}

// A NaN is the best, and the first of equals is.
inline int best_of(const std::vector<double>& cosines) {
  int best = 0;
  for (int j = 1; j < int(cosines.size()); ++j) {
    if (std::isnan(cosines[best])) break;
    if (!(cosines[j] <= cosines[best])) best = j;
  }
  return best;
}

// The chosen key's cosine and the similarity are those of the best key, and the key is the best one
// where that is so by more than rounding.
template <typename Element>
void expect_best(const MatchCase& c, const MatchOperands<Element>& operands,
                 const MatchResult& found, double allowed) {
  for (int i = 0; i < c.batch * c.queries; ++i) {
    const int image = i / c.queries;
    const std::vector<double> cosines = cosines_of(operands, image, i % c.queries);
    const int best = best_of(cosines);
    const std::string where = " for query " + std::to_string(i) + ": " + c.text();
    const int64_t chosen = found.index[i];
    if (chosen < 0 || chosen >= c.keys) {
      fail("no index: " + std::to_string(chosen) + where, std::source_location::current());
      return;
    }
    if (std::isnan(cosines[best])) {
      expect(chosen == best && std::isnan(found.similarity[i]),
             "NaN of key " + std::to_string(best) + ", got " + std::to_string(found.similarity[i]) +
                 " of key " + std::to_string(chosen) + where);
      continue;
    }
    bool clear = true;
    for (int j = 0; j < c.keys; ++j) {
      clear = clear && (j == best || cosines[j] < cosines[best] - 2 * allowed);
    }
    expect(chosen == best || !clear,
           "index " + std::to_string(best) + ", got " + std::to_string(chosen) + where);
    expect(cosines[chosen] >= cosines[best] - 2 * allowed,
           "a key with cosine " + std::to_string(cosines[best]) + ", got one with " +
               std::to_string(cosines[chosen]) + where);
    expect(std::abs(found.similarity[i] - cosines[best]) <= allowed &&
               std::abs(found.similarity[i]) <= 1,
           "similarity " + std::to_string(cosines[best]) + ", got " +
               std::to_string(found.similarity[i]) + ", off by " +
               std::to_string((found.similarity[i] - cosines[best]) * 1e6) + "e-6" + where);
  }
}

// Errors are told with the case, whose seed repeats the run.
template <typename Kind>
MatchResult check(const MatchCase& c, const MatchVectors& vectors) {
  const MatchOperands<typename Kind::Element> operands(c, vectors);
  MatchResult found;
  try {
    found = run<Kind>(c, operands);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
    return {std::vector<int64_t>(size_t(c.batch) * c.queries, -1),
            std::vector<float>(size_t(c.batch) * c.queries, 9)};
  }
  expect_best(c, operands, found, kAllowed<Kind>);
  return found;
}

template <typename Kind>
MatchResult check(const MatchCase& c) {
  return check<Kind>(c, MatchVectors::random(c));
}

template <typename Kind>
void expect_same_bits(const MatchCase& c, const MatchVectors& vectors,
                      const MatchResult& expected) {
  try {
    const MatchOperands<typename Kind::Element> operands(c, vectors);
    expect(run<Kind>(c, operands).same_bits(expected), "the same bits: " + c.text());
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
  }
}

}  // namespace medmoco::test
