// The product of centred operands on the emulator against its formula in float64. Each kind of
// arithmetic is a program of its own, so that they build side by side.

#pragma once

#include <algorithm>

#include "centred_product_case.h"

namespace medmoco::test {

struct MomentCase {
  OperandCase left, right;  // symmetric: right is left
  bool symmetric = true, rows_are_lines = false;
  int multiprocessors = 2;
  uint64_t seed = 1;  // of the order in which threads run

  std::string text() const {
    return "left: " + left.text() + "; right: " + (symmetric ? "left" : right.text()) +
           (rows_are_lines ? "; rows are lines" : "") + "; multiprocessors " +
           std::to_string(multiprocessors) + ", seed " + std::to_string(seed);
  }
};

// Of the parts, all elements of the result: (batch, left lines, right lines).
template <typename Kind>
std::vector<float> run(const MomentCase& c, const OperandInMemory& left,
                       const OperandInMemory& right) {
  EmulatedDevice device{.seed = c.seed};
  const int depth = c.rows_are_lines ? left.c.columns : left.c.rows;
  const int left_lines = c.rows_are_lines ? left.c.rows : left.c.columns;
  const int right_lines = c.rows_are_lines ? right.c.rows : right.c.columns;
  auto plan = MomentPlan::of({left.c.batch, left_lines, right_lines, depth, c.symmetric},
                             c.multiprocessors);
  // NaN where nobody writes.
  std::vector<float> parts(plan.bytes() / sizeof(float), std::nanf(""));
  plan.parts.data = parts.data();
  const Term term{left.operand, right.operand, depth};
  if (c.rows_are_lines) {
    centred_moment<Kind, kRowsAreLines>("moment", plan, term, &device);
  } else {
    centred_moment<Kind, kRowsAreDepth>("moment", plan, term, &device);
  }
  std::vector<float> result;
  for (int b = 0; b < left.c.batch; ++b) {
    for (int i = 0; i < left_lines; ++i) {
      for (int j = 0; j < right_lines; ++j) result.push_back(plan.parts.at(b, i, j));
    }
  }
  return result;
}

template <typename Kind>
std::vector<float> check(const MomentCase& c) {
  const OperandInMemory left(c.left, 1), other(c.symmetric ? c.left : c.right, 2);
  const OperandInMemory& right = c.symmetric ? left : other;
  std::vector<float> found;
  try {
    found = run<Kind>(c, left, right);
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
    return {};
  }
  const auto line = [&](const OperandInMemory& o, int b, int line, int depth) {
    return c.rows_are_lines ? o.at(b, line, depth) : o.at(b, depth, line);
  };
  const int depth = c.rows_are_lines ? left.c.columns : left.c.rows;
  const int rows = c.rows_are_lines ? left.c.rows : left.c.columns;
  const int columns = c.rows_are_lines ? right.c.rows : right.c.columns;
  for (int e = 0; e < int(found.size()); ++e) {
    const int b = e / rows / columns, i = e / columns % rows, j = e % columns;
    Sum expected;
    for (int k = 0; k < depth; ++k) expected.add(line(left, b, i, k), line(right, b, j, k));
    if (is_close<Kind>(found[e], expected)) continue;
    fail("moment (" + std::to_string(i) + ", " + std::to_string(j) + ") of " + std::to_string(b) +
             ": expected " + std::to_string(expected.value) + ", got " + std::to_string(found[e]) +
             ", off by " + std::to_string((found[e] - expected.value) / expected.magnitude * 1e6) +
             "e-6 of the terms: " + c.text(),
         std::source_location::current());
    return found;
  }
  return found;
}

constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBFloat16, Storage::kFloat16};
constexpr Stored kLayouts[] = {Stored::kTogether, Stored::kOddStart, Stored::kRowsApart,
                               Stored::kEveryOther, Stored::kTransposed};

template <typename Kind>
void test_moments_are_those_of_float64() {
  int i = 0;
  for (const int lines : {1, 3, 64, 70, 136}) {
    for (const int depth : {1, 31, 33, 160}) {
      const Storage storage = kStorages[i % 3];
      const Stored stored = kLayouts[i % 5];
      const bool small = lines * depth < 5000;
      const OperandCase features{small ? 3 : 1, depth, lines, storage, stored, true};
      check<Kind>({.left = features, .right = {}, .multiprocessors = 1 + i % 5});
      if (lines == 136) continue;
      OperandCase other = features;
      other.columns = lines + 5;
      other.centred = i % 2;
      check<Kind>({.left = features, .right = other, .symmetric = false});
      const OperandCase rows{1, lines, depth, storage, stored, true, depth > 3};
      check<Kind>({.left = rows, .right = {}, .rows_are_lines = true});
      ++i;
    }
  }
}

// More than 512 lines: large tiles.
template <typename Kind>
void test_large_tiles_give_the_same() {
  check<Kind>({.left = {1, 9, 520, Storage::kBFloat16, Stored::kTogether, true}, .right = {}});
  check<Kind>({.left = {1, 520, 33}, .right = {}, .rows_are_lines = true, .multiprocessors = 9});
}

template <typename Kind>
void test_twenty_schedules_give_the_same_bits() {
  MomentCase c{.left = {2, 200, 36, Storage::kFloat32, Stored::kTogether, true}, .right = {}};
  const std::vector<float> first = check<Kind>(c);
  for (c.seed = 2; c.seed <= 20; ++c.seed) {
    expect(check<Kind>(c) == first, "the same bits: " + c.text());
  }
}

struct ApplyCase {
  int rows, columns, depth, batch = 1;
  bool right_rows_are_lines = true, two_terms = false, subtract = false;
  Storage storage = Storage::kFloat32;  // of left operand, features and output
  Stored stored = Stored::kTogether;
  int multiprocessors = 4;
  uint64_t seed = 1;

  std::string text() const {
    return std::to_string(rows) + " x " + std::to_string(columns) + ", depth " +
           std::to_string(depth) + ", batch " + std::to_string(batch) +
           (right_rows_are_lines ? "" : ", right rows are depth") +
           (two_terms ? ", two terms" : "") + (subtract ? ", subtract" : "") + ", storage " +
           std::to_string(int(storage)) + ", stored " + std::to_string(int(stored)) + ", seed " +
           std::to_string(seed);
  }
  OperandCase left(int of_depth) const { return {batch, rows, of_depth, storage, stored, true}; }
  OperandCase right(int of_depth) const {
    OperandCase right{batch, columns, of_depth};
    if (!right_rows_are_lines) std::swap(right.rows, right.columns), right.centred = true;
    right.zero_diagonal = right_rows_are_lines;
    return right;
  }
};

// Rounding to the output's format.
inline double rounding_of(Storage storage) {
  return storage == Storage::kFloat32 ? 0 : storage == Storage::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

template <typename Kind>
std::vector<double> check(const ApplyCase& c) {
  EmulatedDevice device{.seed = c.seed};
  const int depths[2] = {c.depth, 16};
  const OperandInMemory left(c.left(depths[0])), right(c.right(depths[0]), 2);
  const OperandInMemory left2(c.left(depths[1]), 3), right2(c.right(depths[1]), 4);
  const OperandInMemory features({1, c.rows, c.columns, c.storage, c.stored, true}, 5);
  const float factor = -2;
  std::vector<float> feature_factor;
  for (int j = 0; j < c.columns; ++j) feature_factor.push_back(0.5f * float(j % 5));
  const int64_t width = c.columns * c.batch, size = c.rows * width;
  const auto out = std::make_unique<unsigned char[]>(size * bytes_of(c.storage));
  const ApplyArguments p{
      c.batch,
      c.rows,
      c.columns,
      {{left.operand, right.operand, depths[0]}, {left2.operand, right2.operand, depths[1]}},
      c.two_terms ? 2 : 1,
      0.5f,
      c.subtract ? &factor : nullptr,
      c.subtract ? feature_factor.data() : nullptr,
      features.operand,
      {out.get(), c.storage, c.columns, width}};
  try {
    if (c.right_rows_are_lines) {
      centred_apply<Kind, kRowsAreLines>("apply", p, c.multiprocessors, &device);
    } else {
      centred_apply<Kind, kRowsAreDepth>("apply", p, c.multiprocessors, &device);
    }
  } catch (const std::exception& error) {
    fail(c.text() + ": " + error.what(), std::source_location::current());
    return {};
  }
  const double scale = c.subtract ? 0.5 * factor : 0.5;
  std::vector<double> results;
  for (int64_t e = 0; e < size; ++e) {
    const int row = int(e / width), b = int(e % width / c.columns), column = int(e % c.columns);
    Sum expected;
    const auto add = [&](const OperandInMemory& l, const OperandInMemory& r, int depth) {
      for (int k = 0; k < depth; ++k) {
        const double right = c.right_rows_are_lines ? r.at(b, column, k) : r.at(b, k, column);
        expected.add(l.at(b, row, k), right * scale);
      }
    };
    add(left, right, depths[0]);
    if (c.two_terms) add(left2, right2, depths[1]);
    if (c.subtract) expected.add(features.at(0, row, column), -feature_factor[column] * scale);
    results.push_back(value_of(load_bits(out.get(), c.storage, e), c.storage));
    if (is_close<Kind>(results.back(), expected, rounding_of(c.storage))) continue;
    fail("result (" + std::to_string(row) + ", " + std::to_string(column) + ") of " +
             std::to_string(b) + ": expected " + std::to_string(expected.value) + ", got " +
             std::to_string(results.back()) + ": " + c.text(),
         std::source_location::current());
    return results;
  }
  return results;
}

template <typename Kind>
void test_applied_matrices_are_those_of_float64() {
  int i = 0;
  for (const int columns : {1, 16, 65}) {
    for (const int rows : {1, 66, 130}) {
      const Storage storage = kStorages[i % 3];
      const Stored stored = kLayouts[i % 5];
      check<Kind>({rows, columns, columns, 2, true, bool(i % 2), false, storage, stored});
      check<Kind>({rows, columns, rows, 1, false, true, true, storage, stored});
      ++i;
    }
  }
  check<Kind>({.rows = 130,
               .columns = 70,
               .depth = 40,
               .storage = Storage::kFloat16,
               .multiprocessors = 1});  // large tiles
  check<Kind>({.rows = 70,
               .columns = 260,
               .depth = 40,
               .right_rows_are_lines = false,
               .two_terms = true,
               .subtract = true,
               .multiprocessors = 1});
}

template <typename Kind>
void test_twenty_schedules_apply_the_same_bits() {
  ApplyCase c{.rows = 20, .columns = 36, .depth = 36, .two_terms = true};
  const std::vector<double> first = check<Kind>(c);
  for (c.seed = 2; c.seed <= 20; ++c.seed) {
    expect(check<Kind>(c) == first, "the same bits: " + c.text());
  }
}

// Tiles, numbered through a batch, are found again.
inline void test_tiles_are_found_by_their_number() {
  for (const bool symmetric : {true, false}) {
    const MomentTiles tiles{64, 91, 91, symmetric};
    for (int64_t tile = 0; tile < 2 * tiles.of_each(); ++tile) {
      const auto place = tiles.place(tile);
      expect(place.column <= (symmetric ? place.row : 90) && place.row < 91 &&
                 tiles.tile(place.batch, place.row, place.column) == tile,
             "tile " + std::to_string(tile) + " is found again");
    }
  }
}

// 65,536 features have more elements of parts than an int counts.
inline void test_parts_are_many() {
  const MomentPlan plan = MomentPlan::of({1, 65536, 65536, 256, true}, 132);
  const int last = int(plan.parts.tiles.of_each()) - 1;
  const int block = plan.parts.schedule.last_block(last);
  const int64_t end = plan.parts.part(block, last) + 128 * 128;
  expect(end * int64_t(sizeof(float)) <= plan.bytes() && end > 0x7fffffff,
         "the last part to end before the parts do, got " + std::to_string(end));
}

template <typename Kind>
int test_centred_product() {
  test_moments_are_those_of_float64<Kind>();
  test_large_tiles_give_the_same<Kind>();
  test_twenty_schedules_give_the_same_bits<Kind>();
  test_applied_matrices_are_those_of_float64<Kind>();
  test_twenty_schedules_apply_the_same_bits<Kind>();
  test_tiles_are_found_by_their_number();
  test_parts_are_many();
  return report();
}

}  // namespace medmoco::test
