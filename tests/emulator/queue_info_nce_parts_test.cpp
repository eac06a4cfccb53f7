// The parts of queue_info_nce by themselves: the schedule of its blocks, the copy that aligns rows,
// the combination of parts, and the backward pass.

#include <cmath>
#include <set>

#include "cuda/queue_info_nce_backward.cuh"
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

// Of any strides, even 0, and either gradient alone.
template <typename Element>
void test_the_backward_pass_scales_the_direction_and_the_query() {
  constexpr int kBatch = 30, kDim = 11;
  constexpr double kRounding = sizeof(Element) == 4 ? 0x1p-20 : 0x1p-8;
  std::mt19937_64 random(2);
  const float grad_loss = 3, losses[] = {0, 0.5f, 4};
  const auto direction = unit_rows(random, kBatch, kDim);
  const std::vector<float> transposed(direction.begin(), direction.end());  // (kDim, kBatch)
  const Matrix<Element> query(unit_rows(random, kBatch, kDim), kBatch, kDim, Layout::kApart);
  for (const int outputs : {1, 2, 3}) {
    std::vector<Element> of_query(outputs & 1 ? kBatch * kDim : 0);
    std::vector<Element> of_key(outputs & 2 ? kBatch * kDim : 0);
    std::vector<float> loss;
    for (int i = 0; i < kBatch; ++i) loss.push_back(losses[i % 3]);
    BackwardArguments<Element> a{&grad_loss,
                                 loss.data(),
                                 transposed.data(),
                                 query.rows.data,
                                 0,
                                 1,
                                 {1, kBatch},
                                 {query.rows.row_stride, 1},
                                 kBatch,
                                 kDim,
                                 5,
                                 outputs & 1 ? of_query.data() : nullptr,
                                 outputs & 2 ? of_key.data() : nullptr};
    EmulatedDevice device;
    queue_info_nce_backward(a, &device);
    for (int i = 0; i < kBatch * kDim; ++i) {
      const int row = i / kDim, column = i % kDim;
      const auto check = [&](const std::vector<Element>& found, double expected) {
        if (found.empty()) return;
        expect(std::abs(to_float(found[i]) - expected) <= kRounding * std::abs(expected) + 1e-7,
               "a gradient of " + std::to_string(expected));
      };
      check(of_query, 3.0 * transposed[column * kBatch + row]);
      check(of_key, 3 * std::expm1(-losses[row % 3]) * 5 * query.row(row)[column]);
    }
  }
}

}  // namespace

int main() {
  test_blocks_share_out_every_unit_once_and_their_parts_are_apart();
  test_any_rows_are_packed_and_padded_with_zeros<float>();
  test_any_rows_are_packed_and_padded_with_zeros<BFloat16>();
  test_rows_that_are_aligned_are_not_copied();
  test_parts_are_combined_by_any_number_of_warps();
  test_the_backward_pass_scales_the_direction_and_the_query<float>();
  test_the_backward_pass_scales_the_direction_and_the_query<BFloat16>();
  test_the_backward_pass_scales_the_direction_and_the_query<Half>();
  return report();
}
