// queue_info_nce with operands of float32, rounded to TF32.

#include "queue_info_nce_tests.h"

namespace medmoco::test {
namespace {

// Rounded, query . key would err by far more than the negatives, whose errors average out.
void test_float32_operands_err_no_more_than_was_measured() {
  for (const float temperature : {0.2f, 0.07f}) {
    const Case c{.batch = 16, .queue_size = 8192, .embed_dim = 128, .temperature = temperature};
    const auto operands = random_operands<Tf32x3>(c);
    const auto found = run<Tf32>(c, operands);
    const Errors measured = measured_errors<Tf32>(temperature);
    Errors errors;
    double largest = 0;
    for (int i = 0; i < c.batch; ++i) {
      const Truth truth = truth_of_row<Tf32>(c, operands, i);
      const float* row = found.direction.data() + size_t(i) * c.embed_dim;
      errors.loss = worse(errors.loss, std::abs(found.loss[i] - truth.loss));
      errors.direction =
          worse(errors.direction, largest_difference({row, row + c.embed_dim}, truth.direction));
      for (const double value : truth.direction) largest = std::max(largest, std::abs(value));
    }
    errors.direction /= largest;
    const auto here = std::source_location::current();
    std::printf("float32 operands: loss %.1e, direction %.1e\n", errors.loss, errors.direction);
    expect_error_below("loss", errors.loss, 3 * measured.loss, c, here);
    expect_error_below("direction", errors.direction, 3 * measured.direction, c, here);
  }
}

}  // namespace
}  // namespace medmoco::test

int main() {
  medmoco::test::test_tf32_operands_are_rounded_to_nearest();
  medmoco::test::test_float32_operands_err_no_more_than_was_measured();
  return medmoco::test::test_queue_info_nce<medmoco::Tf32>();
}
