// Races and copies not waited for: each is found, in whatever order the threads run.

#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/primitives.cuh"
#include "expect.h"
#include "faults.h"

using namespace medmoco;
using test::expect;
using test::expect_fault;

namespace {

// Each thread has 16 bytes of shared memory, and its neighbour the next ones.
float* mine(int neighbour = 0) {
  return reinterpret_cast<float*>(shared_memory()) + (threadIdx.x + neighbour) % blockDim.x * 4;
}

alignas(16) constexpr float kSource[8] = {1, 2, 3, 4, 5, 6, 7, 8};

void test_a_barrier_missing_between_write_and_read_is_a_race() {
  const auto kernel = +[] {
    shared_store(mine(), 1.0f);
    shared_load(mine(1));
  };
  expect_fault(kernel, {"faulty, block (0, 0, 0), seed ", "race on shared bytes ", "shared_store",
                        "shared_load at emulator_races_test.cpp:", "no block_barrier since"});
}

void test_a_barrier_missing_between_read_and_overwrite_is_a_race() {
  const auto kernel = +[] {
    shared_store(mine(), 1.0f);
    block_barrier();
    shared_load(mine(1));
    shared_store(mine(), 2.0f);
  };
  expect_fault(kernel, {"race on shared bytes ", "shared_store", "shared_load"});
}

// The shuffles order the accesses in this run; on a GPU they would not.
void test_a_reader_may_not_overwrite_what_another_has_read_too() {
  const auto kernel = +[] {
    float* first = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x == 0) shared_load(first);
    shuffle_xor(0, 1);
    if (threadIdx.x == 1) shared_load(first);
    shuffle_xor(0, 1);
    if (threadIdx.x == 0) shared_store(first, 2.0f);
  };
  expect_fault(kernel,
               {"thread 0 (warp 0, lane 0), shared_store",
                "read by other threads too, besides thread 0 (warp 0, lane 0), shared_load"});
}

void test_two_writers_race_even_with_the_same_value() {
  const auto kernel = +[] { shared_store(reinterpret_cast<float*>(shared_memory()), 1.0f); };
  expect_fault(kernel, {"shared bytes 0 to 1, written by"});
}

void test_a_shuffle_does_not_make_sharing_within_a_warp_safe() {
  const auto kernel = +[] {
    shared_store(mine(), 1.0f);
    shuffle_xor(0, 1);
    shared_load(mine(threadIdx.x % 2 ? -1 : 1));
  };
  expect_fault(kernel, {"race on shared bytes "});
}

void test_ldmatrix_reads_for_the_lane_that_gives_the_address() {
  const auto kernel = +[] {
    shared_store(mine(), 1.0f);
    uint32_t matrices[4];
    ldmatrix(matrices, mine(threadIdx.x == 5));
  };
  expect_fault(kernel, {"thread 5 (warp 0, lane 5), ldmatrix", "thread 6 (warp 0, lane 6)"});
}

void test_neighbours_may_write_next_to_each_other() {
  EmulatedDevice device{.seed = 1};
  const auto kernel = +[] {
    auto* halves = reinterpret_cast<Half*>(shared_memory());
    shared_store(halves + threadIdx.x, Half{0});
    shared_load(halves + threadIdx.x);
  };
  launch("neighbours", kernel, 1, 64, 128, &device);
}

void copy(float* to, const float* from = kSource) {
  cp_async<16>(to, from, true);
  cp_async_commit();
}

void test_reading_a_copy_without_a_wait_is_a_race_also_after_a_barrier() {
  const auto kernel = +[] {
    copy(mine());
    block_barrier();
    shared_load(mine());
  };
  expect_fault(kernel, {"shared_load", "being written by thread ", "cp_async at ",
                        "not yet waited for by cp_async_wait"});
}

void test_a_wait_that_covers_too_few_groups_is_found() {
  const auto kernel = +[] {
    copy(mine());
    copy(mine() + 64 * 4);
    cp_async_wait<1>();
    shared_load(mine());
    shared_load(mine() + 64 * 4);
  };
  expect_fault(kernel, {"shared_load", "not yet waited for"});
}

void test_a_wait_does_not_cover_what_was_not_committed() {
  const auto kernel = +[] {
    cp_async<16>(mine(), kSource, true);
    cp_async_wait<0>();
    shared_load(mine());
  };
  expect_fault(kernel, {"not yet waited for"});
}

void test_a_copy_waited_for_needs_a_barrier_before_others_read_it() {
  const auto kernel = +[] {
    copy(mine());
    cp_async_wait<0>();
    shared_load(mine());
    shared_load(mine(1));
  };
  expect_fault(kernel, {"shared_load", "cp_async"});
}

// Here the copy has arrived, and its thread has waited for it, before the other reads.
void test_a_barrier_before_the_wait_does_not_help_others() {
  const auto kernel = +[] {
    float* first = reinterpret_cast<float*>(shared_memory());
    if (threadIdx.x == 0) copy(first);
    block_barrier();
    if (threadIdx.x == 0) cp_async_wait<0>();
    shuffle_xor(0, 1);
    if (threadIdx.x == 1) shared_load(first);
  };
  expect_fault(kernel,
               {"thread 1 (warp 0, lane 1), shared_load",
                "written by thread 0 (warp 0, lane 0), cp_async", "no block_barrier since"});
}

void test_refilling_a_buffer_that_others_still_read_is_a_race() {
  const auto kernel = +[] {
    shared_store(mine(), 1.0f);
    block_barrier();
    uint32_t matrices[4];
    ldmatrix(matrices, mine(1));
    copy(mine());
  };
  expect_fault(kernel, {"ldmatrix", "cp_async"});
}

// A pipeline of two buffers as it should be.
void pipeline_kernel(const float* source, float* sums, int rounds, bool wait, bool second_barrier) {
  constexpr int kStage = 64 * 4;
  float sum = 0;
  copy(mine(), source + threadIdx.x * 4);
  for (int round = 0; round < rounds; ++round) {
    if (round + 1 < rounds) {
      cp_async<16>(mine() + (round + 1) % 2 * kStage, source + threadIdx.x * 4, true);
    }
    cp_async_commit();
    if (wait) cp_async_wait<1>();
    block_barrier();
    sum += shared_load(mine(1) + round % 2 * kStage);
    if (second_barrier) block_barrier();
  }
  sums[threadIdx.x] = sum;
}

void test_a_pipeline_is_clean_and_each_part_of_it_needed() {
  const std::vector<float> source(64 * 4, 1);
  std::vector<float> sums(64);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    EmulatedDevice device{.seed = seed};
    launch("pipeline", pipeline_kernel, 1, 64, 2048, &device, source.data(), sums.data(), 7, true,
           true);
    for (const float sum : sums) expect(sum == 7, "the sum of seven copies");
  }
  const auto here = std::source_location::current();
  expect_fault(pipeline_kernel, {"not yet waited for"}, here, source.data(), sums.data(), 7, false,
               true);
  expect_fault(pipeline_kernel, {"race"}, here, source.data(), sums.data(), 7, true, false);
}

// With the detector off the values tell: bytes of a copy under way are NaN.
void test_a_copy_under_way_poisons_its_target() {
  EmulatedDevice device{.seed = 1, .detect_races = false};
  float seen[64];
  const auto kernel = +[](float* seen) {
    shared_store(mine(), 3.0f);
    copy(mine());
    seen[threadIdx.x] = shared_load(mine());
  };
  launch("early", kernel, 1, 64, test::kSharedBytes, &device, seen);
  for (const float value : seen) expect(std::isnan(value), "poison, not what was there before");
}

}  // namespace

int main() {
  test_a_barrier_missing_between_write_and_read_is_a_race();
  test_a_barrier_missing_between_read_and_overwrite_is_a_race();
  test_a_reader_may_not_overwrite_what_another_has_read_too();
  test_two_writers_race_even_with_the_same_value();
  test_a_shuffle_does_not_make_sharing_within_a_warp_safe();
  test_ldmatrix_reads_for_the_lane_that_gives_the_address();
  test_neighbours_may_write_next_to_each_other();
  test_reading_a_copy_without_a_wait_is_a_race_also_after_a_barrier();
  test_a_wait_that_covers_too_few_groups_is_found();
  test_a_wait_does_not_cover_what_was_not_committed();
  test_a_copy_waited_for_needs_a_barrier_before_others_read_it();
  test_a_barrier_before_the_wait_does_not_help_others();
  test_refilling_a_buffer_that_others_still_read_is_a_race();
  test_a_pipeline_is_clean_and_each_part_of_it_needed();
  test_a_copy_under_way_poisons_its_target();
  return test::report();
}
