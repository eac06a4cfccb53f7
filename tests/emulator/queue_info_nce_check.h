// Compares queue_info_nce on the emulator with float64.

#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#include "expect.h"
#include "queue_info_nce_truth.h"

namespace medmoco::test {

// How close the errors of all cases came to what is allowed.
struct Closest {
  double share = 0;
  std::string text = "nothing";

  void note(double error, double allowed, const std::string& where) {
    if (allowed == 0 || error / allowed <= share) return;
    share = error / allowed;
    char numbers[64];
    std::snprintf(numbers, sizeof numbers, "%.1e of %.1e: ", error, allowed);
    text = numbers + where;
  }
};
inline Closest closest_loss, closest_direction;

inline void print_closest() {
  std::printf("closest to the bounds: loss %s\n                 direction %s\n",
              closest_loss.text.c_str(), closest_direction.text.c_str());
}

inline double worse(double a, double b) { return a <= b ? b : a; }  // a NaN stays

inline double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (size_t i = 0; i < b.size(); ++i) largest = worse(largest, std::abs(a[i] - b[i]));
  return largest;
}

inline void expect_error_below(const char* of, double error, double allowed, const Case& c,
                               const std::source_location& where) {
  char text[128];
  std::snprintf(text, sizeof text, "an error of the %s of at most %.2e, got %.2e: ", of, allowed,
                error);
  expect(error <= allowed, text + c.text(), where);
}

// Errors, never more than `most`, are told with the case, whose seed repeats the run.
template <typename Kind>
void check(const Case& c, const Operands<typename Kind::Element>& operands, Errors most = {1, 1},
           std::source_location where = std::source_location::current()) {
  Result found;
  try {
    found = run<Kind>(c, operands);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), where);
    return;
  }
  const std::vector<float> queue(operands.queue.values.begin(), operands.queue.values.end());
  Errors errors, of_eager;
  double largest_direction = 0, largest_value = 0;
  for (int i = 0; i < c.batch; ++i) {
    const Truth truth = truth_of_row<Kind>(c, operands, i);
    const Row eager = eager_row<Kind>(c, operands, queue, i);
    errors.loss = worse(errors.loss, std::abs(found.loss[i] - truth.loss));
    of_eager.loss = worse(of_eager.loss, std::abs(eager.loss - truth.loss));
    largest_value = std::max({largest_value, truth.largest_logit, truth.loss});
    expect(found.rank[i] >= truth.surely_not_below && found.rank[i] <= truth.maybe_not_below,
           "a rank from " + std::to_string(truth.surely_not_below) + " to " +
               std::to_string(truth.maybe_not_below) + ", got " + std::to_string(found.rank[i]) +
               " in row " + std::to_string(i) + ": " + c.text(),
           where);
    if (!c.direction) continue;
    const float* row = found.direction.data() + size_t(i) * c.embed_dim;
    errors.direction =
        worse(errors.direction, largest_difference({row, row + c.embed_dim}, truth.direction));
    of_eager.direction =
        worse(of_eager.direction, largest_difference(eager.direction, truth.direction));
    for (const double value : truth.direction) {
      largest_direction = std::max(largest_direction, std::abs(value));
    }
  }
  const double unit = largest_direction > 0 ? largest_direction : 1;  // none: it must be 0
  errors.direction /= unit;
  of_eager.direction /= unit;
  Errors allowed = allowed_errors(of_eager, largest_value);
  allowed.loss = std::min(allowed.loss, most.loss);
  allowed.direction = largest_direction > 0 ? std::min(allowed.direction, most.direction) : 0;
  if (std::getenv("MEDMOCO_PRINT_ERRORS")) {
    std::printf("%s: loss %.1e, direction %.1e, eager %.1e, %.1e\n", c.text().c_str(), errors.loss,
                errors.direction, of_eager.loss, of_eager.direction);
  }
  closest_loss.note(errors.loss, allowed.loss, c.text());
  closest_direction.note(errors.direction, allowed.direction, c.text());
  expect_error_below("loss", errors.loss, allowed.loss, c, where);
  expect_error_below("direction", errors.direction, allowed.direction, c, where);
}

template <typename Kind>
void check(const Case& c, std::source_location where = std::source_location::current()) {
  check<Kind>(c, random_operands<Kind>(c), {1, 1}, where);
}

}  // namespace medmoco::test
