// What a thread of a kernel does, and how an error message says it.

#pragma once

#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

namespace medmoco::emulator {

enum class Operation : uint8_t {
  kRunning,
  kReturned,
  kSharedLoad,
  kSharedStore,
  kCopy,
  kLdmatrix,
  kLdmatrixTransposed,
  kMma,
  kShuffle,
  kAny,
  kWarpBarrier,
  kBarrier,
};

inline const char* name_of(Operation operation) {
  constexpr const char* kNames[] = {
      "running",     "returned", "shared_load",         "shared_store",
      "cp_async",    "ldmatrix", "ldmatrix_transposed", "mma",
      "shuffle_xor", "warp_any", "warp_barrier",        "block_barrier",
  };
  return kNames[static_cast<int>(operation)];
}

inline std::string place_of(const std::source_location& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

// An operation of a thread, at a line of the kernel.
struct Access {
  std::source_location where;
  uint32_t epoch = 0;  // see SharedMemory
  uint16_t thread = 0;
  Operation operation = Operation::kRunning;
};

inline std::string thread_name(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / 32) + ", lane " +
         std::to_string(thread % 32) + ")";
}

inline std::string describe(const Access& access) {
  return thread_name(access.thread) + ", " + name_of(access.operation) + " at " +
         place_of(access.where);
}

}  // namespace medmoco::emulator
