// An emulated device, and the launch of a kernel on it.

#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.h"

namespace medmoco {

// Runs kernels in the order that the seed gives; each launch has another. Stays usable after an
// error.
struct EmulatedDevice {
  uint64_t seed = 0;
  bool detect_races = true;           // without it, a race shows in the result only, if at all
  uint64_t launches = 0;              // so far
  std::vector<std::string> errors{};  // what launch() has thrown
};
using Stream = EmulatedDevice*;

namespace emulator {

struct Launch {
  const char* name;
  dim3 grid, block;
  int shared_bytes;
  EmulatedDevice& device;

  std::string describe(const uint3& index) const {
    return std::string(name) + ", block (" + std::to_string(index.x) + ", " +
           std::to_string(index.y) + ", " + std::to_string(index.z) + "), " + seed();
  }
  std::string seed() const {
    return "seed " + std::to_string(device.seed) + ", launch " + std::to_string(device.launches);
  }
};

inline constinit thread_local const Launch* running_launch = nullptr;

// When a sanitizer ends the program, says which kernel and seed it was.
inline void describe_crash() {
  if (!running_launch || !running_block) return;
  std::fprintf(stderr, "medmoco emulator: in %s, %s\n", running_launch->describe(blockIdx).c_str(),
               thread_name(running_block->running_thread()).c_str());
}

inline void watch_for_crashes() {
#if defined(__SANITIZE_ADDRESS__)
  static const bool watching = (__sanitizer_set_death_callback(describe_crash), true);
  (void)watching;
#endif
}

// What a GPU of compute capability 8.0 would refuse.
inline void check_launch(const Launch& launch) {
  const auto [name, grid, block, shared_bytes, device] = launch;
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string(name) + ": " + what);
  };
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    refuse("a block has 1 to 1024 threads, at most 64 in z, got " + std::to_string(block.x) +
           " x " + std::to_string(block.y) + " x " + std::to_string(block.z));
  }
  if (threads % 32 != 0) {
    refuse("a block must consist of whole warps of 32, got " + std::to_string(threads) +
           " threads");
  }
  constexpr int kMost = 163 * 1024;
  if (shared_bytes < 0 || shared_bytes > kMost) {
    refuse("a block has 0 to " + std::to_string(kMost) + " bytes of shared memory, got " +
           std::to_string(shared_bytes));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    refuse("a grid has at most 2147483647 x 65535 x 65535 blocks, got " + std::to_string(grid.x) +
           " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
}

// All blocks, one after the other, in a random order.
inline void run_grid(const Launch& launch, const std::function<void()>& kernel) {
  Random random(launch.device.seed * 1000003 + launch.device.launches);
  SharedMemory memory(launch.shared_bytes, launch.device.detect_races);
  Block block(launch.block, memory, random, kernel);
  std::vector<uint64_t> order(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  std::iota(order.begin(), order.end(), 0);
  blockDim = launch.block;
  gridDim = launch.grid;
  for (size_t left = order.size(); left > 0; --left) {
    std::swap(order[random.below(static_cast<uint32_t>(left))], order[left - 1]);
    const uint64_t number = order[left - 1], x = launch.grid.x, y = launch.grid.y;
    blockIdx = {static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
                static_cast<unsigned>(number / x / y)};
    try {
      block.run();
    } catch (const std::exception& error) {
      throw std::runtime_error(launch.describe(blockIdx) + ": " + error.what());
    }
  }
}

}  // namespace emulator

// Runs kernel(arguments...) to its end. Throws std::runtime_error for what a GPU would refuse, and
// for what goes wrong in the kernel.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            int shared_bytes, Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;  // an empty batch
  const emulator::Launch launch{name, grid, block, shared_bytes, *stream};
  emulator::watch_for_crashes();
  ++stream->launches;
  emulator::running_launch = &launch;
  try {
    emulator::check_launch(launch);
    emulator::run_grid(launch, [&] { kernel(static_cast<Parameters>(arguments)...); });
  } catch (const std::exception& error) {
    emulator::running_launch = nullptr;
    stream->errors.push_back(error.what());
    throw;
  }
  emulator::running_launch = nullptr;
}

}  // namespace medmoco
