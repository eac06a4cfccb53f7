// Accesses out of place, threads that diverge, launches that a GPU refuses, crashes: each is found
// and its message says where.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"
#include "expect.h"
#include "faults.h"

using namespace medmoco;
using test::expect;
using test::expect_equal;
using test::expect_error;
using test::expect_fault;
using test::kSharedBytes;
using test::output_of_crash;

namespace {

alignas(16) constexpr float kSource[8] = {};

void test_accesses_out_of_bounds_are_named() {
  expect_fault(+[] { shared_load(reinterpret_cast<float*>(shared_memory() + kSharedBytes)); },
               {"shared_load at emulator_faults_test.cpp:",
                "out of bounds: shared bytes 4096 to 4099 of 4096"});
  expect_fault(+[] { shared_store(reinterpret_cast<float*>(shared_memory()) - 1, 1.0f); },
               {"shared_store", "out of bounds: shared bytes -4 to -1"});
  const auto last_row = +[] {
    uint32_t matrices[4];
    ldmatrix(matrices, shared_memory() + kSharedBytes - (threadIdx.x == 40 ? 0 : 16));
  };
  expect_fault(last_row, {"thread 40 (warp 1, lane 8), ldmatrix", "4096 to 4111 of 4096"});
  expect_fault(+[] { cp_async<16>(shared_memory() + kSharedBytes, kSource, false); },
               {"cp_async", "out of bounds"});
  const auto not_shared = +[] {
    float local = 0;
    shared_load(&local);
  };
  expect_fault(not_shared, {"shared_load", "the address is not in shared memory"});
}

void test_misaligned_accesses_are_named() {
  const auto row = +[] {
    uint32_t matrices[4];
    ldmatrix_transposed(matrices, shared_memory() + 8);
  };
  expect_fault(row, {"ldmatrix_transposed", "shared byte 8 is not a multiple of 16"});
  expect_fault(+[] { cp_async<16>(shared_memory() + 8, kSource, true); },
               {"cp_async", "shared byte 8 is not a multiple of 16"});
  expect_fault(+[] { cp_async<8>(shared_memory() + 8 * threadIdx.x, kSource + 1, true); },
               {"cp_async", "the source is not a multiple of 8"});
  expect_fault(+[] { shared_load(reinterpret_cast<float*>(shared_memory() + 2)); },
               {"shared_load", "shared byte 2 is not a multiple of 4"});
}

void test_the_source_of_a_copy_must_be_valid_even_where_it_is_not_read() {
  expect_fault(+[] { cp_async<16>(shared_memory() + 16 * threadIdx.x, nullptr, false); },
               {"cp_async", "the source is not a valid address"});
  auto freed = std::make_unique<std::vector<float>>(64);
  const float* dangling = freed->data();
  freed.reset();
  const auto kernel =
      +[](const float* source) { cp_async<16>(shared_memory() + 16 * threadIdx.x, source, false); };
  expect_fault(kernel, {"the source is not a valid address"}, std::source_location::current(),
               dangling);
}

void test_lanes_at_different_collectives_have_diverged() {
  const auto kinds = +[] {
    if (threadIdx.x < 40) {
      shuffle_xor(1, 1);
    } else {
      warp_any(true);
    }
  };
  expect_fault(kinds, {"the lanes of warp 1 have diverged",
                       "lane 0 to 7: at shuffle_xor (emulator_faults_test.cpp:",
                       "lane 8 to 31: at warp_any (emulator_faults_test.cpp:"});
  const auto missing = +[] {
    if (threadIdx.x != 33) warp_barrier();
    shuffle_xor(1, 1);
  };
  expect_fault(missing, {"lane 0: at warp_barrier", "lane 1: at shuffle_xor"});
  const auto returned = +[] {
    if (threadIdx.x == 3) return;
    float sum[4] = {};
    const uint32_t a[4] = {};
    mma_m16n8k8(sum, a, 0, 0);
  };
  expect_fault(returned, {"lane 0 to 2: at mma", "lane 3: returned", "lane 4 to 31: at mma"});
  const auto barrier = +[] {
    if (threadIdx.x % 32 == 31) block_barrier();
    shuffle_xor(1, 1);
    if (threadIdx.x % 32 != 31) block_barrier();
  };
  expect_fault(barrier, {"lane 0 to 30: at shuffle_xor", "lane 31: at block_barrier"});
}

void test_lanes_at_the_same_collective_in_different_places_have_diverged() {
  const auto kernel = +[] {
    if (threadIdx.x % 2) {
      shuffle_xor(1, 1);
    } else {
      shuffle_xor(1, 1);
    }
  };
  expect_fault(kernel, {"warp 0 have diverged", "lane 0: at shuffle_xor", "lane 1: at shuffle"});
}

void test_a_shuffle_to_no_lane_is_named() {
  expect_fault(+[] { shuffle_xor(1, 32); }, {"shuffle_xor at ", "no lane differs by 32"});
}

void test_a_barrier_that_some_never_reach_is_an_error_and_no_hang() {
  const auto returned = +[] {
    if (threadIdx.x == 63) return;
    block_barrier();
  };
  expect_fault(returned, {"some threads never reach block_barrier", "thread 0 to 62: at block_bar",
                          "thread 63: returned"});
  const auto fewer = +[] {
    for (unsigned i = 0; i <= threadIdx.x / 32; ++i) block_barrier();
  };
  expect_fault(fewer, {"thread 0 to 31: returned", "thread 32 to 63: at block_barrier"});
}

// Goes wrong in one block of a grid, if told so.
__global__ void __launch_bounds__(64) sometimes_kernel(bool go_wrong, int* blocks) {
  if (threadIdx.x == 0) ++*blocks;
  block_barrier();
  const bool here = go_wrong && blockIdx.x == 2 && blockIdx.y == 1;
  if (here && threadIdx.x == 33) shared_load(reinterpret_cast<int*>(shared_memory()) + 1);
  block_barrier();
}

void test_an_error_names_its_place_and_leaves_the_device_usable() {
  EmulatedDevice device{.seed = 77};
  int blocks = 0;
  const auto run = [&](bool go_wrong) {
    launch("sometimes", sometimes_kernel, dim3(3, 2), 64, 4, &device, go_wrong, &blocks);
  };
  run(false);
  expect_equal(blocks, 6, "blocks run");
  expect_error([&] { run(true); }, {"sometimes, block (2, 1, 0), seed 77, launch 2: thread 33 "});
  expect_equal(device.errors.size(), 1, "errors kept");
  blocks = 0;
  run(false);
  expect_equal(blocks, 6, "blocks run after an error");
}

void test_launches_that_a_gpu_refuses() {
  const auto refused = [](dim3 block, int shared_bytes, const std::string& message) {
    EmulatedDevice device;
    const auto run = [&] { launch("refused", +[] {}, 1, block, shared_bytes, &device); };
    expect_error(run, {"refused: " + message});
    expect_equal(device.errors.size(), 1, "errors kept");
  };
  refused(64, 163 * 1024 + 1, "a block has 0 to 166912 bytes of shared memory, got 166913");
  refused(64, -1, "a block has 0 to 166912 bytes of shared memory, got -1");
  refused(dim3(32, 33), 0, "a block has 1 to 1024 threads, at most 64 in z, got 32 x 33 x 1");
  refused(0, 0, "a block has 1 to 1024 threads");
  refused(48, 0, "a block must consist of whole warps of 32, got 48 threads");
  EmulatedDevice device;
  expect_error([&] { launch("refused", +[] {}, dim3(1, 65536), 32, 0, &device); },
               {"refused: a grid has at most"});
  launch("accepted", +[] {}, 1, 1024, 163 * 1024, &device);
}

void test_a_primitive_outside_of_a_kernel_is_an_error() {
  expect_error([] { block_barrier(); }, {"outside of a kernel"});
}

void test_a_crash_names_kernel_thread_and_seed() {
  const auto run = [](auto kernel, const float* source) {
    EmulatedDevice device{.seed = 9};
    launch("crash", kernel, 1, 64, kSharedBytes, &device, source);
  };
  const std::vector<float> source(8);
  const auto overrun = +[](const float* source) {
    if (threadIdx.x == 35) cp_async<16>(shared_memory(), source + 8, true);
  };
  const std::string place = "medmoco emulator: in crash, block (0, 0, 0), seed 9, launch 1, ";
  std::string output = output_of_crash([&] { run(overrun, source.data()); });
  expect(output.find("heap-buffer-overflow") != output.npos, "a report of the overrun: " + output);
  expect(output.find(place + "thread 35 (warp 1, lane 3)") != output.npos, "a place: " + output);

  const auto direct =
      +[](const float*) { *reinterpret_cast<volatile float*>(shared_memory()) = 1; };
  output = output_of_crash([&] { run(direct, nullptr); });
  expect(output.find("SEGV") != output.npos, "direct access to shared memory to fault: " + output);
  expect(output.find(place) != output.npos, "a place: " + output);
}

}  // namespace

int main() {
  test_accesses_out_of_bounds_are_named();
  test_misaligned_accesses_are_named();
  test_the_source_of_a_copy_must_be_valid_even_where_it_is_not_read();
  test_lanes_at_different_collectives_have_diverged();
  test_lanes_at_the_same_collective_in_different_places_have_diverged();
  test_a_shuffle_to_no_lane_is_named();
  test_a_barrier_that_some_never_reach_is_an_error_and_no_hang();
  test_an_error_names_its_place_and_leaves_the_device_usable();
  test_launches_that_a_gpu_refuses();
  test_a_primitive_outside_of_a_kernel_is_an_error();
  test_a_crash_names_kernel_thread_and_seed();
  return test::report();
}
