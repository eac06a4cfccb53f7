// Threads, warps, blocks and the order in which they run.

#include <cstdint>
#include <numeric>
#include <set>
#include <vector>

#include "cuda/primitives.cuh"
#include "expect.h"

using namespace medmoco;
using test::expect;
using test::expect_equal;

namespace {

__global__ void __launch_bounds__(64) index_kernel(int* visits, int* order, int* next) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int number = block * blockDim.x * blockDim.y * blockDim.z + thread;
  ++visits[number];
  order[(*next)++] = number;  // no race here: fibers take turns
}

std::vector<int> order_of_threads(uint64_t seed, int launches = 1) {
  constexpr int kThreads = 2 * 3 * 4 * 64;
  EmulatedDevice device{.seed = seed};
  std::vector<int> order(kThreads);
  for (int i = 0; i < launches; ++i) {
    std::vector<int> visits(kThreads, 0);
    int next = 0;
    launch("index", index_kernel, dim3(2, 3, 4), dim3(4, 8, 2), 0, &device, visits.data(),
           order.data(), &next);
    for (const int count : visits) expect_equal(count, 1, "runs of a thread");
  }
  return order;
}

void test_each_thread_of_each_block_runs_once() { order_of_threads(1); }

void test_a_seed_gives_the_same_order_and_another_seed_another() {
  expect(order_of_threads(1) == order_of_threads(1), "the order to follow from the seed");
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < 20; ++seed) orders.insert(order_of_threads(seed));
  expect_equal(orders.size(), 20, "orders of 20 seeds");
  expect(order_of_threads(1, 2) != order_of_threads(1), "the next launch to have another order");
}

void test_blocks_run_in_any_order() {
  std::set<int> first_blocks;
  for (uint64_t seed = 0; seed < 200; ++seed) first_blocks.insert(order_of_threads(seed)[0] / 64);
  expect_equal(first_blocks.size(), 2 * 3 * 4, "blocks that came first under some seed");
}

__global__ void __launch_bounds__(64) primitive_index_kernel(int* numbers) {
  numbers[block_id() * 64 + thread_id()] = static_cast<int>(blockIdx.x * 64 + threadIdx.x);
}

void test_threads_and_blocks_know_their_number() {
  std::vector<int> numbers(3 * 64, -1);
  EmulatedDevice device{.seed = 6};
  launch("numbers", primitive_index_kernel, 3, 64, 0, &device, numbers.data());
  for (int i = 0; i < 3 * 64; ++i) expect_equal(numbers[i], i, "block_id() * 64 + thread_id()");
}

__global__ void __launch_bounds__(64) shuffle_kernel(int* values, float* fractions) {
  const int thread = threadIdx.x;
  for (int mask = 0; mask < kWarpLanes; ++mask) {
    values[thread * kWarpLanes + mask] = shuffle_xor(thread, mask);
    fractions[thread * kWarpLanes + mask] = shuffle_xor(0.5f * thread, mask);
  }
}

void test_shuffle_takes_the_value_of_the_other_lane() {
  std::vector<int> values(64 * 32);
  std::vector<float> fractions(64 * 32);
  EmulatedDevice device{.seed = 2};
  launch("shuffle", shuffle_kernel, 1, 64, 0, &device, values.data(), fractions.data());
  for (int i = 0; i < 64 * 32; ++i) {
    expect_equal(values[i], i / 32 ^ i % 32, "an int");
    expect_equal(fractions[i], 0.5 * (i / 32 ^ i % 32), "a float");
  }
}

__global__ void __launch_bounds__(96) any_kernel(int* seen, int chosen) {
  seen[threadIdx.x] = warp_any(static_cast<int>(threadIdx.x) == chosen);
}

void test_any_tells_the_whole_warp_and_no_other() {
  for (const int chosen : {0, 45, 95, -1}) {
    std::vector<int> seen(96, -1);
    EmulatedDevice device{.seed = 3};
    launch("any", any_kernel, 1, 96, 0, &device, seen.data(), chosen);
    for (int i = 0; i < 96; ++i) {
      expect_equal(seen[i], chosen >= 0 && i / 32 == chosen / 32, "whether any lane was chosen");
    }
  }
}

// The sum of the block's `count` values: by shuffles in each warp, then over the warps.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* values, int count, float* sums) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += values[blockIdx.x * count + i];
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (lane == 0) shared_store(shared + warp, sum);
  block_barrier();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < kThreads / kWarpLanes; ++other) sum += shared_load(shared + other);
  sums[blockIdx.x] = sum;
}

template <int kThreads>
void test_sum_of_a_block() {
  for (const int blocks : {1, 3, 7}) {
    for (const int count : {0, 1, 31, 333, 1025}) {
      std::vector<float> values(blocks * count), sums(blocks, -1);
      std::iota(values.begin(), values.end(), 1.0f);
      EmulatedDevice device{.seed = 4};
      launch("sum", sum_kernel<kThreads>, blocks, kThreads, kThreads / 8, &device, values.data(),
             count, sums.data());
      for (int block = 0; block < blocks; ++block) {
        const double first = double(block) * count + 1, last = double(block + 1) * count;
        expect_equal(sums[block], (first + last) * count / 2, "a sum of integers");
      }
    }
  }
}

void test_an_empty_grid_runs_nothing() {
  EmulatedDevice device{.seed = 5};
  int visits = 0;
  launch("index", index_kernel, dim3(0), dim3(32), 0, &device, &visits, &visits, &visits);
  expect_equal(visits, 0, "runs of threads");
}

}  // namespace

int main() {
  test_each_thread_of_each_block_runs_once();
  test_a_seed_gives_the_same_order_and_another_seed_another();
  test_blocks_run_in_any_order();
  test_threads_and_blocks_know_their_number();
  test_shuffle_takes_the_value_of_the_other_lane();
  test_any_tells_the_whole_warp_and_no_other();
  test_sum_of_a_block<32>();
  test_sum_of_a_block<96>();
  test_sum_of_a_block<1024>();
  test_an_empty_grid_runs_nothing();
  return test::report();
}
