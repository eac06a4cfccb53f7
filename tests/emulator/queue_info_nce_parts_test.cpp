// The parts of queue_info_nce by themselves: the schedule of its blocks, the copy that aligns rows,
// and the combination of parts.

#include <cmath>
#include <set>

#include "expect.h"
#include "queue_info_nce_combine.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

std::string text_of(int query_tiles, int queue_tiles, int blocks) {
  return std::to_string(query_tiles) + " x " + std::to_string(queue_tiles) + " tiles, " +
         std::to_string(blocks) + " blocks";
}

// A block walks as the forward kernel does.
void check_schedule(int query_tiles, int queue_tiles, int blocks_at_once) {
  const auto schedule = Schedule::of(query_tiles, queue_tiles, blocks_at_once);
  const std::string text = text_of(query_tiles, queue_tiles, blocks_at_once);
  expect(schedule.blocks() <= blocks_at_once, "no more blocks than asked for: " + text);
  std::vector<int> visits(size_t(query_tiles) * queue_tiles);
  std::vector<std::vector<int>> parts_of_tile(query_tiles);
  std::set<int> parts;
  int64_t longest = 0;
  for (int block = 0; block < schedule.blocks(); ++block) {
    int64_t units = 0;
    for (int tile = schedule.first_query_tile(block); schedule.has_query_tile(block, tile);
         ++tile) {
      const int first = schedule.first_queue_tile(block, tile);
      const int end = schedule.end_queue_tile(block, tile);
      expect(tile < query_tiles && 0 <= first && first < end && end <= queue_tiles,
             "a part of the work that is there: " + text);
      if (tile >= query_tiles || end > queue_tiles) return;
      for (int j = first; j < end; ++j) ++visits[size_t(tile) * queue_tiles + j];
      units += end - first;
      const int part = schedule.part(block, tile);
      expect(0 <= part && part < schedule.parts() && parts.insert(part).second,
             "a place for every part: " + text);
      parts_of_tile[tile].push_back(part);
    }
    longest = std::max(longest, units);
  }
  for (const int count : visits) expect(count == 1, "every unit once: " + text);
  expect(longest == schedule.units_per_block, "equal runs: " + text);
  for (int tile = 0; tile < query_tiles; ++tile) {
    std::vector<int> read;
    for (int block = schedule.first_block(tile); block <= schedule.last_block(tile); ++block) {
      read.push_back(schedule.part(block, tile));
    }
    expect(read == parts_of_tile[tile], "all parts of a tile, in order: " + text);
  }
}

void test_blocks_share_out_every_unit_once_and_their_parts_are_apart() {
  for (const int query_tiles : {1, 2, 3, 7, 98}) {
    for (const int queue_tiles : {1, 2, 5, 16, 64, 1024}) {
      for (const int blocks : {1, 2, 3, 4, 14, 216, 264}) {
        check_schedule(query_tiles, queue_tiles, blocks);
      }
    }
  }
}

template <typename Element>
void check_pack(const Rows<Element>& rows, const Matrix<Element>& matrix, unsigned blocks) {
  const int64_t padded = padded_dim<Element>(rows.dim);
  std::vector<Element> packed(size_t(rows.count * padded));
  EmulatedDevice device;
  launch("pack_rows", pack_rows_kernel<Element>, dim3(blocks), dim3(kPackThreads), 0, &device, rows,
         padded, packed.data());
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t c = 0; c < padded; ++c) {
      const double expected = c < rows.dim ? matrix.row(i)[c] : 0;
      expect_equal(to_float(packed[size_t(i * padded + c)]), expected, "an element");
    }
  }
}

template <typename Element>
void test_any_rows_are_packed_and_padded_with_zeros() {
  std::mt19937_64 random(1);
  for (const int dim : {1, 7, 8, 100}) {
    for (const auto layout :
         {Layout::kDense, Layout::kApart, Layout::kMisaligned, Layout::kTransposed}) {
      const Matrix<Element> matrix(unit_rows(random, 37, dim), 37, dim, layout);
      for (const unsigned blocks : {1, 2, 20}) check_pack(matrix.rows, matrix, blocks);
    }
  }
}

void test_rows_that_are_aligned_are_not_copied() {
  std::mt19937_64 random(1);
  const auto copied = [&](int dim, Layout layout) {
    const Matrix<float> matrix(unit_rows(random, 3, dim), 3, dim, layout);
    std::vector<float> packed(size_t(3 * padded_dim<float>(dim)));
    EmulatedDevice device;
    const auto rows = align_rows(matrix.rows, packed.data(), &device);
    expect(rows.chunks == (dim + 3) / 4 && rows.count == 3, "whole chunks");
    expect((packed_bytes(matrix.rows) > 0) == (device.launches > 0), "memory for a copy alone");
    expect(rows.data == (device.launches > 0 ? packed.data() : matrix.rows.data), "its rows");
    return device.launches > 0;
  };
  expect(!copied(8, Layout::kDense), "no copy of dense rows");
  expect(!copied(8, Layout::kApart), "no copy of aligned rows");
  expect(copied(7, Layout::kDense), "a copy of rows of 28 bytes");
  expect(copied(8, Layout::kMisaligned), "a copy of misaligned rows");
  expect(copied(8, Layout::kTransposed), "a copy of columns");
}

}  // namespace

int main() {
  test_blocks_share_out_every_unit_once_and_their_parts_are_apart();
  test_any_rows_are_packed_and_padded_with_zeros<float>();
  test_any_rows_are_packed_and_padded_with_zeros<BFloat16>();
  test_rows_that_are_aligned_are_not_copied();
  test_parts_are_combined_by_any_number_of_warps();
  return report();
}
