// Runs queue_info_nce on the emulator, on operands of any layout.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/queue_info_nce.cuh"

namespace medmoco::test {

enum class Layout {
  kDense,       // rows one after the other: aligned where a row is a multiple of 16 bytes
  kApart,       // rows with others between them, aligned; ids with others between them
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

// A matrix in some layout. The memory ends where the matrix does, so that AddressSanitizer sees a
// read beyond; without rows there is none, as in an empty tensor.
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
    if (count > 0 && dim > 0) memory.reset(new Element[offset + last + 1]);
    rows = {memory ? memory.get() + offset : nullptr, count, dim, row_stride, column_stride};
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

struct Ids {
  std::vector<int64_t> values, memory;
  int64_t stride = 1;

  Ids() = default;
  Ids(std::vector<int64_t> wanted, Layout layout)
      : values(std::move(wanted)), stride(layout == Layout::kApart ? 3 : 1) {
    memory.resize(values.empty() ? 0 : (values.size() - 1) * stride + 1);
    for (size_t i = 0; i < values.size(); ++i) memory[i * stride] = values[i];
  }
};

// Rows of unit length before rounding. Those of a single column are shorter: of 1 and -1 there
// would be two logits, and luck with the rounding of two weights.
inline std::vector<double> unit_rows(std::mt19937_64& random, int count, int dim) {
  std::normal_distribution<double> normal;
  std::vector<double> values(size_t(count) * dim);
  for (int i = 0; i < count; ++i) {
    double square = 1e-30;
    for (int c = 0; c < dim; ++c)
      square += std::pow(values[size_t(i) * dim + c] = normal(random), 2);
    const double length = dim > 1 ? 1 : 0.5 + 0.5 / (1 + square);
    for (int c = 0; c < dim; ++c) values[size_t(i) * dim + c] *= length / std::sqrt(square);
  }
  return values;
}

template <typename Element>
struct Operands {
  Matrix<Element> query, key, queue;
  Ids query_ids = {}, queue_ids = {};

  // As wide and as many as the case says; ids are set by the caller.
  static Operands of(const Case& c, std::vector<double> query, std::vector<double> key,
                     std::vector<double> queue) {
    return {{std::move(query), c.batch, c.embed_dim, c.layout},
            {std::move(key), c.batch, c.embed_dim, c.layout},
            {std::move(queue), c.queue_size, c.embed_dim, c.layout}};
  }
};

// As a kind of operand is rounded before it is multiplied.
template <typename Kind>
float as_operand(double value) {
  if constexpr (std::is_same_v<Kind, Tf32>) return float_of(round_to_tf32(float(value)));
  return to_float(from_float<typename Kind::Element>(float(value)));
}

// Drawn alike for all layouts, temperatures and seeds.
template <typename Kind>
Operands<typename Kind::Element> random_operands(const Case& c) {
  std::mt19937_64 random(c.batch * 7919 + c.queue_size * 31 + c.embed_dim);
  auto query = unit_rows(random, c.batch, c.embed_dim);
  auto near = unit_rows(random, c.batch, c.embed_dim);
  auto queue = unit_rows(random, c.queue_size, c.embed_dim);
  for (size_t i = 0; i < near.size(); ++i) near[i] = (query[i] + near[i]) / std::sqrt(2.0);
  for (auto* values : {&query, &near, &queue}) {
    for (double& value : *values) value = as_operand<Kind>(value);
  }
  auto operands = Operands<typename Kind::Element>::of(c, query, near, queue);
  if (c.ids) {  // some negative, and some that differ in the upper half alone
    std::vector<int64_t> query_ids, queue_ids;
    for (int i = 0; i < c.batch; ++i) query_ids.push_back(i % 5 - 1);
    for (int j = 0; j < c.queue_size; ++j) {
      queue_ids.push_back(j % 7 - 1 + (j % 11 == 0 ? int64_t(1) << 32 : 0));
    }
    operands.query_ids = {query_ids, c.layout};
    operands.queue_ids = {queue_ids, c.layout};
  }
  return operands;
}

struct Result {
  std::vector<float> loss, direction;
  std::vector<int32_t> rank;

  // NaN are equal where their bits are.
  bool same_bits(const Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() &&
             std::equal(a.begin(), a.end(), b.begin(), [](float left, float right) {
               return std::bit_cast<uint32_t>(left) == std::bit_cast<uint32_t>(right);
             });
    };
    return same(loss, other.loss) && same(direction, other.direction) && rank == other.rank;
  }
};

// Throws what the emulator finds wrong.
template <typename Kind>
Result run(const Case& c, const Operands<typename Kind::Element>& operands) {
  EmulatedDevice device{.seed = c.seed};
  const float nan = std::numeric_limits<float>::quiet_NaN();  // where nobody writes
  Result result{std::vector<float>(c.batch, nan), {}, std::vector<int32_t>(c.batch, -1)};
  if (c.direction) result.direction.assign(size_t(c.batch) * c.embed_dim, nan);
  QueueInfoNce<typename Kind::Element> p{};
  p.query = operands.query.rows;
  p.key = operands.key.rows;
  p.queue = operands.queue.rows;
  p.temperature = c.temperature;
  if (c.ids) {
    p.query_ids = operands.query_ids.memory.data();
    p.query_ids_stride = operands.query_ids.stride;
    p.queue_ids = operands.queue_ids.memory.data();
    p.queue_ids_stride = operands.queue_ids.stride;
  }
  p.loss = result.loss.data();
  p.rank = result.rank.data();
  float nothing;  // for a direction without columns
  p.direction = !c.direction ? nullptr : c.embed_dim > 0 ? result.direction.data() : &nothing;
  std::unique_ptr<void, decltype(&std::free)> workspace(nullptr, std::free);
  const auto allocate = [&](int64_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, size_t(bytes)) != 0) std::abort();
    std::fill_n(static_cast<unsigned char*>(memory), bytes, 0xff);  // NaN where nobody writes
    workspace.reset(memory);
    return memory;
  };
  queue_info_nce_forward<Kind>(p, c.multiprocessors, allocate, &device);
  return result;
}

}  // namespace medmoco::test
