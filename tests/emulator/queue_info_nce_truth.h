// queue_info_nce in float64, as eager PyTorch computes it, and what the kernel may err by.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "queue_info_nce_case.h"

namespace medmoco::test {

struct Row {
  double loss;
  std::vector<double> direction;
};

struct Truth : Row {
  double largest_logit;                   // of what counts, in absolute value
  int surely_not_below, maybe_not_below;  // the rank lies between: near ties depend on rounding
};

// How much q . k of unit rows may be off in the kernel. A chain of 32 sums, each truncated to 2^-23
// of it, errs by 2^-18.
constexpr double kScoreError = 0x1p-18;

// The hot loops of the tests. Sanitizers would make them five times as slow as the kernel.
#define MEDMOCO_PLAIN_LOOP __attribute__((no_sanitize("address", "undefined"), noinline))

MEDMOCO_PLAIN_LOOP inline double dot(const double* a, const double* b, int64_t dim) {
  double sum = 0;
  for (int64_t c = 0; c < dim; ++c) sum += a[c] * b[c];
  return sum;
}

// In float32, a fused multiplication and addition at a time, as a matrix product on CUDA.
MEDMOCO_PLAIN_LOOP inline float dot(const float* a, const float* b, int64_t dim) {
  float sum = 0;
  for (int64_t c = 0; c < dim; ++c) sum = float(double(a[c]) * b[c] + sum);
  return sum;
}

template <typename T>
MEDMOCO_PLAIN_LOOP void add_row(std::vector<T>& sums, T weight, const T* row) {
  T* const sum = sums.data();
  const size_t dim = sums.size();
  for (size_t c = 0; c < dim; ++c) sum[c] = T(double(weight) * row[c] + sum[c]);
}

template <typename Element>
bool left_out(const Case& c, const Operands<Element>& o, int query, int entry) {
  if (!c.ids) return false;
  const int64_t id = o.queue_ids.values[entry];
  return id >= 0 && id == o.query_ids.values[query];
}

template <typename Kind>
Truth truth_of_row(const Case& c, const Operands<typename Kind::Element>& o, int i) {
  const int64_t dim = c.embed_dim;
  const double positive = dot(o.query.row(i), o.key.row(i), dim) / c.temperature;
  const double near = 2 * kScoreError / c.temperature;
  std::vector<double> logits(c.queue_size, -std::numeric_limits<double>::infinity());
  double peak = -1e300;
  Truth truth{{0, std::vector<double>(dim, 0.0)}, std::abs(positive), 0, 0};
  for (int j = 0; j < c.queue_size; ++j) {
    if (left_out(c, o, i, j)) continue;
    logits[j] = dot(o.query.row(i), o.queue.row(j), dim) / c.temperature;
    peak = std::max(peak, logits[j]);
    truth.largest_logit = std::max(truth.largest_logit, std::abs(logits[j]));
    truth.surely_not_below += !(logits[j] < positive + near);
    truth.maybe_not_below += !(logits[j] < positive - near);
  }
  double sum = 0;
  for (int j = 0; j < c.queue_size; ++j) {
    const double weight = std::exp(logits[j] - peak);
    sum += weight;
    if (c.direction) add_row(truth.direction, weight, o.queue.row(j));
  }
  const double gap = sum > 0 ? peak + std::log(sum) - positive : -1e300;
  truth.loss = gap > 0 ? gap + std::log1p(std::exp(-gap)) : std::log1p(std::exp(gap));
  const double negatives = -std::expm1(-truth.loss);
  for (int64_t d = 0; d < dim; ++d) {
    const double mean = sum > 0 ? truth.direction[d] / sum : 0;
    truth.direction[d] = negatives * (mean - o.key.row(i)[d]) / c.temperature;
  }
  return truth;
}

// What eager PyTorch does with operands of this kind on CUDA,
// F.cross_entropy(torch.cat([p, q @ Q.T / T], 1), zeros) in float32, and its gradient, whose
// weights are rounded for the product with Q. Under autocast eager rounds the logits to 16 bits
// too, and its gradient at the end; the kernel does neither, so it is held to an eager that does
// not.
template <typename Kind>
Row eager_row(const Case& c, const Operands<typename Kind::Element>& o,
              const std::vector<float>& queue, int i) {
  const int64_t dim = c.embed_dim;
  const std::vector<float> query(o.query.row(i), o.query.row(i) + dim);
  const std::vector<float> key(o.key.row(i), o.key.row(i) + dim);
  const float positive = dot(query.data(), key.data(), dim) / c.temperature;
  std::vector<float> logits(c.queue_size, -std::numeric_limits<float>::infinity());
  float peak = positive;
  for (int j = 0; j < c.queue_size; ++j) {
    if (left_out(c, o, i, j)) continue;
    logits[j] = dot(query.data(), queue.data() + j * dim, dim) / c.temperature;
    peak = std::max(peak, logits[j]);
  }
  double sum = std::exp(positive - peak);  // a GPU adds up as a tree: nearly exact
  for (const float logit : logits) sum += std::exp(logit - peak);
  const float log_sum = peak + std::log(float(sum));
  Row row{double(log_sum) - positive, {}};
  if (!c.direction) return row;
  std::vector<float> direction(dim, 0.0f);
  for (int j = 0; j < c.queue_size; ++j) {
    const float weight = as_operand<Kind>(std::exp(logits[j] - log_sum) / c.temperature);
    add_row(direction, weight, queue.data() + j * dim);
  }
  const float of_key = (std::exp(positive - log_sum) - 1) / c.temperature;
  for (int64_t d = 0; d < dim; ++d) row.direction.push_back(direction[d] + of_key * key[d]);
  return row;
}

// Errors of the loss, and of the gradient over the largest gradient.
struct Errors {
  double loss = 0, direction = 0;
};

// What was measured at 65536 keys of 128 dimensions.
template <typename Kind>
Errors measured_errors(float temperature) {
  const bool warm = temperature == 0.2f;  // else 0.07
  if (Kind::kPrecise) return warm ? Errors{1.7e-6, 1e-7} : Errors{2.2e-6, 2.7e-6};
  if (std::is_same_v<Kind, SixteenBit<BFloat16>>) {
    return warm ? Errors{1.4e-4, 8.3e-5} : Errors{3.7e-3, 6.9e-3};
  }
  return warm ? Errors{1.7e-5, 1.2e-5} : Errors{5.6e-4, 9.1e-4};
}

// Twice the error of eager, and a few places of the last digit: of the largest logit or loss.
inline Errors allowed_errors(const Errors& of_eager, double largest_value) {
  constexpr double kLastPlaces = 4 * 0x1p-23;
  return {2 * of_eager.loss + kLastPlaces * std::max(1.0, largest_value),
          2 * of_eager.direction + kLastPlaces};
}

}  // namespace medmoco::test
