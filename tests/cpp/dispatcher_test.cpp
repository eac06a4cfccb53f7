// Calls an operator as a C++ program does, through the dispatcher and without Python, and compares
// with values worked out by hand.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <tuple>

namespace {

using at::Tensor;
using std::optional;

int failures = 0;

void expect_near(const char* what, const Tensor& tensor, double expected) {
  const auto* values = tensor.const_data_ptr<float>();
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    if (std::abs(values[i] - expected) < 1e-6) continue;
    std::printf("%s: expected %.7f, got %.7f\n", what, expected, values[i]);
    ++failures;
  }
}

template <typename Signature>
auto find(const char* op) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
}

std::tuple<Tensor, Tensor, Tensor> queue_info_nce(const Tensor& query, const Tensor& key,
                                                  const Tensor& queue, double temperature) {
  static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Tensor&, double, const optional<Tensor>&,
      const optional<Tensor>&, bool, bool)>("medmoco::queue_info_nce");
  return op.call(query, key, queue, temperature, std::nullopt, std::nullopt, true, false);
}

std::tuple<Tensor, Tensor> queue_info_nce_backward(const Tensor& grad_loss, const Tensor& query,
                                                   const Tensor& loss, const Tensor& direction,
                                                   double temperature) {
  static const auto op =
      find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      double, bool, bool)>("medmoco::queue_info_nce_backward");
  return op.call(grad_loss, query, loss, direction, temperature, true, true);
}

// A positive of logit 1 and seven negatives of logit 0: the loss is log((e + 7) / e).
void test_loss_and_gradient() {
  const Tensor one = at::full({4, 1}, 1.0f), queue = at::full({7, 1}, 0.0f);
  const auto [loss, rank, direction] = queue_info_nce(one, one, queue, 1.0);
  expect_near("loss", loss, std::log1p(7 / std::exp(1.0)));

  const auto [grad_query, grad_key] =
      queue_info_nce_backward(at::full({4}, 2.0f), one, loss, direction, 1.0);
  const double expected = -2 * 7 / (std::exp(1.0) + 7);
  expect_near("gradient of query", grad_query, expected);
  expect_near("gradient of key", grad_key, expected);
}

void test_uniform_similarity_gives_log_of_candidates() {
  const Tensor one = at::full({4, 1}, 1.0f);
  expect_near("loss", std::get<0>(queue_info_nce(one, one, at::full({7, 1}, 1.0f), 0.2)),
              std::log(8.0));
}

void test_error_names_what_was_expected() {
  const std::string expected =
      "queue_info_nce: queue must be (queue_size, 1) to match query, got (7, 2)";
  std::string message = "no error";
  try {
    const Tensor one = at::full({4, 1}, 1.0f);
    queue_info_nce(one, one, at::full({7, 2}, 1.0f), 0.2);
  } catch (const std::exception& error) {
    message = error.what();
  }
  if (message.find(expected) != std::string::npos) return;
  std::printf("expected an error that says: %s\ngot: %s\n", expected.c_str(), message.c_str());
  ++failures;
}

}  // namespace

int main() {
  test_loss_and_gradient();
  test_uniform_similarity_gives_log_of_candidates();
  test_error_names_what_was_expected();
  if (failures == 0) std::printf("all passed\n");
  return failures != 0;
}
