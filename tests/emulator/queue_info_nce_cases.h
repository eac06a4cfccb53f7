// queue_info_nce on the emulator against its formula in float64.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/queue_info_nce.cuh"
#include "expect.h"

namespace medmoco::test {

enum class Layout {
  kDense,       // rows one after the other: aligned where a row is a multiple of 16 bytes
  kApart,       // rows with others between them, aligned
  kMisaligned,  // the first element at an odd address
  kTransposed,
};

struct Case {
  int batch, queue_size, embed_dim;
  float temperature = 0.2f;
  bool ids = false, direction = true;
  int multiprocessors = 1;  // so blocks, and parts of the queue
  Layout layout = Layout::kDense;
  uint64_t seed = 1;  // of the order in which threads run

  std::string text() const {
    std::ostringstream text;
    text << "batch " << batch << ", queue_size " << queue_size << ", embed_dim " << embed_dim
         << ", temperature " << temperature << (ids ? ", ids" : "")
         << (direction ? "" : ", no direction") << ", multiprocessors " << multiprocessors
         << ", layout " << int(layout) << ", seed " << seed;
    return text.str();
  }
};

// A matrix in some layout, each row of unit length before rounding. The memory ends where the
// matrix does, so that AddressSanitizer sees a read beyond.
template <typename Element>
struct Matrix {
  std::vector<double> values;  // (count, dim), rounded to Element
  std::unique_ptr<Element[]> memory;
  Rows<Element> rows;

  Matrix(std::vector<double> wanted, int count, int dim, Layout layout)
      : values(std::move(wanted)) {
    const int64_t offset = layout == Layout::kMisaligned;
    const int64_t apart = 16 / sizeof(Element);
    const int64_t row_stride = layout == Layout::kApart        ? (dim + 2 * apart) / apart * apart
                               : layout == Layout::kTransposed ? 1
                                                               : dim;
    const int64_t column_stride = layout == Layout::kTransposed ? std::max(count, 1) : 1;
    const int64_t last = (count - 1) * row_stride + (dim - 1) * column_stride;
    memory.reset(new Element[count && dim ? offset + last + 1 : 0]);
    rows = {memory.get() + offset, count, dim, row_stride, column_stride};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < dim; ++c) {
        const Element rounded = from_float<Element>(float(values[i * dim + c]));
        memory[offset + i * row_stride + c * column_stride] = rounded;
        values[i * dim + c] = to_float(rounded);
      }
    }
  }
  const double* row(int64_t i) const { return values.data() + i * rows.dim; }
};

inline std::vector<double> unit_rows(std::mt19937_64& random, int count, int dim) {
  std::normal_distribution<double> normal;
  std::vector<double> values(size_t(count) * dim);
  for (int i = 0; i < count; ++i) {
    double square = 1e-30;
    for (int c = 0; c < dim; ++c)
      square += std::pow(values[size_t(i) * dim + c] = normal(random), 2);
    for (int c = 0; c < dim; ++c) values[size_t(i) * dim + c] /= std::sqrt(square);
  }
  return values;
}

inline double dot(const double* a, const double* b, int64_t dim) {
  double sum = 0;
  for (int64_t c = 0; c < dim; ++c) sum += a[c] * b[c];
  return sum;
}

template <typename Element>
struct Operands {
  Matrix<Element> query, key, queue;
  std::vector<int64_t> query_ids, queue_ids;

  static Operands random(const Case& c) {
    std::mt19937_64 random(c.batch * 7919 + c.queue_size * 31 + c.embed_dim);
    auto query = unit_rows(random, c.batch, c.embed_dim);
    auto near = unit_rows(random, c.batch, c.embed_dim);
    for (size_t i = 0; i < near.size(); ++i) near[i] = (query[i] + near[i]) / std::sqrt(2.0);
    Operands operands{
        {query, c.batch, c.embed_dim, c.layout},
        {near, c.batch, c.embed_dim, c.layout},
        {unit_rows(random, c.queue_size, c.embed_dim), c.queue_size, c.embed_dim, c.layout},
        {},
        {}};
    if (c.ids) {  // some negative, and some that differ in the upper half alone
      for (int i = 0; i < c.batch; ++i) operands.query_ids.push_back(i % 5 - 1);
      for (int j = 0; j < c.queue_size; ++j) {
        operands.queue_ids.push_back(j % 7 - 1 + (j % 11 == 0 ? int64_t(1) << 32 : 0));
      }
    }
    return operands;
  }
};

struct Result {
  std::vector<float> loss, direction;
  std::vector<int32_t> rank;
};

template <typename Kind>
Result run(const Case& c, const Operands<typename Kind::Element>& operands) {
  EmulatedDevice device{.seed = c.seed};
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Result result{std::vector<float>(c.batch, nan), {}, std::vector<int32_t>(c.batch, -1)};
  if (c.direction) result.direction.assign(size_t(c.batch) * c.embed_dim, nan);
  QueueInfoNce<typename Kind::Element> p{};
  p.query = operands.query.rows;
  p.key = operands.key.rows;
  p.queue = operands.queue.rows;
  p.temperature = c.temperature;
  if (c.ids) {
    p.query_ids = operands.query_ids.data();
    p.queue_ids = operands.queue_ids.data();
    p.query_ids_stride = p.queue_ids_stride = 1;
  }
  p.loss = result.loss.data();
  p.rank = result.rank.data();
  p.direction = c.direction ? result.direction.data() : nullptr;
  std::unique_ptr<void, decltype(&std::free)> workspace(nullptr, std::free);
  queue_info_nce_forward<Kind>(
      p, c.multiprocessors,
      [&](int64_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, size_t(bytes)) != 0) std::abort();
        std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff);  // NaN where nobody writes
        workspace.reset(memory);
        return memory;
      },
      &device);
  return result;
}

// What loss and gradient may err by, at a temperature of 1.
struct Allowed {
  double loss, direction;
};

struct Truth {
  double loss;
  int surely_not_below, perhaps_not_below;  // the rank lies between: ties depend on rounding
  std::vector<double> direction;
};

template <typename Element>
Truth truth_of_row(const Case& c, const Operands<Element>& o, int i) {
  const int64_t dim = c.embed_dim;
  const double positive = dot(o.query.row(i), o.key.row(i), dim) / c.temperature;
  std::vector<double> logits(c.queue_size, -std::numeric_limits<double>::infinity());
  double most = -1e300;
  Truth truth{0, 0, 0, std::vector<double>(dim, 0.0)};
  for (int j = 0; j < c.queue_size; ++j) {
    if (c.ids && o.queue_ids[j] >= 0 && o.queue_ids[j] == o.query_ids[i]) continue;
    logits[j] = dot(o.query.row(i), o.queue.row(j), dim) / c.temperature;
    most = std::max(most, logits[j]);
    truth.surely_not_below += !(logits[j] < positive + 1e-4 / c.temperature);
    truth.perhaps_not_below += !(logits[j] < positive - 1e-4 / c.temperature);
  }
  double sum = 0;
  for (double& logit : logits) sum += logit = std::exp(logit - most);
  const double gap = sum > 0 ? most + std::log(sum) - positive : -1e300;
  truth.loss = gap > 0 ? gap + std::log1p(std::exp(-gap)) : std::log1p(std::exp(gap));
  const double negatives = -std::expm1(-truth.loss);
  for (int64_t d = 0; d < dim; ++d) {
    double mean = 0;
    for (int j = 0; j < c.queue_size; ++j) mean += logits[j] * o.queue.row(j)[d];
    mean = sum > 0 ? mean / sum : 0;
    truth.direction[d] = negatives * (mean - o.key.row(i)[d]) / c.temperature;
  }
  return truth;
}

// Errors are told with the case, whose seed repeats the run.
template <typename Kind>
void check(const Case& c, Allowed allowed) {
  const auto operands = Operands<typename Kind::Element>::random(c);
  Result found;
  try {
    found = run<Kind>(c, operands);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
    return;
  }
  double loss_error = 0, direction_error = 0, largest = 1e-30;
  for (int i = 0; i < c.batch; ++i) {
    const Truth truth = truth_of_row(c, operands, i);
    const double error = std::abs(found.loss[i] - truth.loss);
    loss_error = error <= loss_error ? loss_error : error;  // NaN stays
    expect(found.rank[i] >= truth.surely_not_below && found.rank[i] <= truth.perhaps_not_below,
           "a rank from " + std::to_string(truth.surely_not_below) + " to " +
               std::to_string(truth.perhaps_not_below) + ", got " + std::to_string(found.rank[i]) +
               " in row " + std::to_string(i) + ": " + c.text());
    for (int d = 0; c.direction && d < c.embed_dim; ++d) {
      const double value = truth.direction[d];
      const double wrong = std::abs(found.direction[size_t(i) * c.embed_dim + d] - value);
      direction_error = wrong <= direction_error ? direction_error : wrong;
      largest = std::max(largest, std::abs(value));
    }
  }
  const double direction_bound = allowed.direction * largest;
  if (std::getenv("MEDMOCO_PRINT_ERRORS")) {
    std::printf("%s: loss %.1e, direction %.1e\n", c.text().c_str(), loss_error,
                direction_error / largest);
  }
  expect(loss_error <= allowed.loss, "an error of the loss of at most " +
                                         std::to_string(allowed.loss * 1e6) + "e-6, got " +
                                         std::to_string(loss_error * 1e6) + "e-6: " + c.text());
  expect(direction_error <= direction_bound,
         "an error of the direction of at most " + std::to_string(allowed.direction * 1e6) +
             "e-6 of its largest, got " + std::to_string(direction_error / largest * 1e6) +
             "e-6: " + c.text());
}

}  // namespace medmoco::test
