// Shared memory, ldmatrix and cp_async.

#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/primitives.cuh"
#include "expect.h"

using namespace medmoco;
using test::expect;
using test::expect_equal;

namespace {

struct Pair {
  float first;
  int second;
};

template <typename T>
__global__ void __launch_bounds__(64) reverse_kernel(T* values) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int thread = threadIdx.x;
  shared_store(shared + thread, values[thread]);
  block_barrier();
  values[thread] = shared_load(shared + 63 - thread);
}

// Elements of 2, 4 and 8 bytes, in exactly as much memory as they need.
template <typename T>
void test_threads_share_what_they_store(T (*make)(int), int (*number_of)(T)) {
  std::vector<T> values(64);
  for (int i = 0; i < 64; ++i) values[i] = make(i);
  EmulatedDevice device{.seed = 1};
  launch("reverse", reverse_kernel<T>, 1, 64, 64 * sizeof(T), &device, values.data());
  for (int i = 0; i < 64; ++i) expect_equal(number_of(values[i]), 63 - i, "the value across");
}

// Four matrices of 8 x 8, filled with 0, 1, 2, ...; `padding` bytes lie between their rows.
__global__ void __launch_bounds__(32)
    ldmatrix_kernel(uint16_t* fragments, int padding, bool transposed) {
  unsigned char* shared = shared_memory();
  const int lane = threadIdx.x, stride = 16 + padding;
  for (int i = lane; i < 256; i += 32) {
    auto* row = reinterpret_cast<uint16_t*>(shared + i / 8 * stride);
    shared_store(row + i % 8, static_cast<uint16_t>(i));
  }
  block_barrier();
  uint32_t matrices[4];
  if (transposed) {
    ldmatrix_transposed(matrices, shared + lane * stride);
  } else {
    ldmatrix(matrices, shared + lane * stride);
  }
  for (int i = 0; i < 4; ++i) {
    fragments[(lane * 4 + i) * 2] = static_cast<uint16_t>(matrices[i]);
    fragments[(lane * 4 + i) * 2 + 1] = static_cast<uint16_t>(matrices[i] >> 16);
  }
}

void test_ldmatrix_hands_each_lane_two_elements_of_each_matrix() {
  for (const bool transposed : {false, true}) {
    for (const int padding : {0, 16}) {
      std::vector<uint16_t> fragments(32 * 8);
      EmulatedDevice device{.seed = 2};
      launch("ldmatrix", ldmatrix_kernel, 1, 32, 32 * (16 + padding), &device, fragments.data(),
             padding, transposed);
      for (int i = 0; i < 32 * 8; ++i) {
        const int lane = i / 8, matrix = i / 2 % 4, row = lane / 4, column = lane % 4 * 2 + i % 2;
        const int element = transposed ? column * 8 + row : row * 8 + column;
        expect_equal(fragments[i], matrix * 64 + element, "a fragment's element");
      }
    }
  }
}

// Each thread copies kBytes of its own, and next to them zeros in place of the same bytes.
template <int kBytes>
__global__ void __launch_bounds__(32) copy_kernel(const float* source, float* target) {
  constexpr int kFloats = kBytes / 4;
  float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x * 2 * kFloats;
  const float* from = source + threadIdx.x * kFloats;
  cp_async<kBytes>(mine, from, true);
  cp_async<kBytes>(mine + kFloats, from, false);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 2 * kFloats; ++i) {
    target[threadIdx.x * 2 * kFloats + i] = shared_load(mine + i);
  }
}

template <int kBytes>
void test_copies_arrive_or_are_zeros() {
  constexpr int kFloats = kBytes / 4;
  std::vector<float> source(32 * kFloats), target(64 * kFloats, -1);
  std::iota(source.begin(), source.end(), 1.0f);
  EmulatedDevice device{.seed = 3};
  launch("copy", copy_kernel<kBytes>, 1, 32, 64 * kBytes, &device, source.data(), target.data());
  for (int i = 0; i < 64 * kFloats; ++i) {
    const int thread = i / (2 * kFloats), column = i % (2 * kFloats);
    const float copied = column < kFloats ? source[thread * kFloats + column] : 0;
    expect_equal(target[i], copied, "a copied float");
  }
}

constexpr int kGroups = 4;

// What each group of a thread holds once all but the latest `kPending` have been waited for.
template <int kPending>
__global__ void __launch_bounds__(64) group_kernel(const float* source, float* seen) {
  float* mine = reinterpret_cast<float*>(shared_memory()) + threadIdx.x * 4 * kGroups;
  for (int group = 0; group < kGroups; ++group) {
    cp_async<16>(mine + 4 * group, source + 4 * group, true);
    cp_async_commit();
  }
  cp_async<16>(mine, source, false);  // in no group: no wait covers it, nor need it
  for (int i = 0; i < 8; ++i) shuffle_xor(1, 1);
  cp_async_wait<kPending>();
  for (int group = 0; group < kGroups; ++group) {
    seen[threadIdx.x * kGroups + group] = shared_load(mine + 4 * group + 3);
  }
}

// Counts how many copies of each group had arrived; the others were still poison.
template <int kPending>
std::vector<int> arrived_groups() {
  const std::vector<float> source(4 * kGroups, 5);
  std::vector<float> seen(64 * kGroups);
  EmulatedDevice device{.seed = 4, .detect_races = false};  // reads before the wait
  launch("groups", group_kernel<kPending>, 1, 64, 64 * 16 * kGroups, &device, source.data(),
         seen.data());
  std::vector<int> arrived(kGroups);
  for (int i = 0; i < 64 * kGroups; ++i) {
    expect(seen[i] == 5 || seen[i] == 0 || std::isnan(seen[i]), "the copy or poison");
    arrived[i % kGroups] += seen[i] == 5;
  }
  return arrived;
}

// Group 0 is left out: a copy that nobody waits for goes to the same bytes.
void test_a_wait_covers_all_groups_but_the_latest() {
  const std::vector<int> none = arrived_groups<0>(), two = arrived_groups<2>();
  for (int group = 1; group < kGroups; ++group) {
    expect_equal(none[group], 64, "copies that no group was pending for");
  }
  expect_equal(two[1], 64, "copies two groups back");
  for (int group = 2; group < kGroups; ++group) {
    expect(0 < two[group] && two[group] < 32, "copies not waited for to arrive now and then");
  }
}

__global__ void __launch_bounds__(32) late_source_kernel(float* source, float* target) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
  source += 4 * threadIdx.x;
  cp_async<16>(shared, source, true);
  cp_async_commit();
  for (int i = 0; i < 4; ++i) shuffle_xor(1, 1);
  source[0] = 2;
  cp_async_wait<0>();
  target[threadIdx.x] = shared_load(shared);
}

void test_the_source_is_read_on_arrival() {
  std::vector<float> source(4 * 32, 1), target(32);
  EmulatedDevice device{.seed = 5};
  launch("late source", late_source_kernel, 1, 32, 512, &device, source.data(), target.data());
  int early = 0;
  for (const float value : target) early += value == 1;
  expect(0 < early && early < 32, "some copies before and some after the source changed");
}

template <typename T>
__global__ void __launch_bounds__(32) read_kernel(float* values) {
  values[threadIdx.x] = to_float(shared_load(reinterpret_cast<T*>(shared_memory()) + threadIdx.x));
}

template <typename T>
void test_memory_never_written_is_nan() {
  std::vector<float> values(32, 0);
  EmulatedDevice device{.seed = 6};
  launch("read", read_kernel<T>, 1, 32, 32 * sizeof(T), &device, values.data());
  for (const float value : values) expect_equal(value, NAN, "memory never written");
}

__global__ void __launch_bounds__(32) leave_behind_kernel(float* values) {
  float* shared = reinterpret_cast<float*>(shared_memory()) + threadIdx.x;
  values[blockIdx.x * 32 + threadIdx.x] = shared_load(shared);
  shared_store(shared, 1.0f);
}

void test_a_block_finds_nothing_of_the_block_before() {
  std::vector<float> values(3 * 32, 0);
  EmulatedDevice device{.seed = 7};
  launch("leave behind", leave_behind_kernel, 3, 32, 128, &device, values.data());
  for (const float value : values) expect_equal(value, NAN, "memory of a new block");
}

}  // namespace

int main() {
  test_threads_share_what_they_store<Half>(
      [](int i) { return from_float<Half>(static_cast<float>(i)); },
      [](Half value) { return static_cast<int>(to_float(value)); });
  test_threads_share_what_they_store<int>([](int i) { return i; }, [](int value) { return value; });
  test_threads_share_what_they_store<Pair>([](int i) { return Pair{0, i}; },
                                           [](Pair pair) { return pair.second; });
  test_ldmatrix_hands_each_lane_two_elements_of_each_matrix();
  test_copies_arrive_or_are_zeros<8>();
  test_copies_arrive_or_are_zeros<16>();
  test_a_wait_covers_all_groups_but_the_latest();
  test_the_source_is_read_on_arrival();
  test_memory_never_written_is_nan<float>();
  test_memory_never_written_is_nan<BFloat16>();
  test_memory_never_written_is_nan<Half>();
  test_a_block_finds_nothing_of_the_block_before();
  return test::report();
}
