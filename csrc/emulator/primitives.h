// The primitives of csrc/cuda on the CPU, with the same names and parameters; those end with the
// place of the call, for error messages, where the GPU's have none. See csrc/cuda for what each
// does.

#pragma once

#include <bit>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "block.h"
#include "cuda_words.h"
#include "launch.h"
#include "number_formats.h"
#include "tensor_core.h"

namespace medmoco {

constexpr int kWarpLanes = 32;

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_id() { return static_cast<int>(blockIdx.x); }

__device__ __forceinline__ int count_bits(uint32_t bits) { return std::popcount(bits); }

__device__ __forceinline__ unsigned char* shared_memory() {
  return emulator::Block::current().memory().window();
}

template <typename T>
__device__ __forceinline__ T
shared_load(const T* address, std::source_location where = std::source_location::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 2 == 0,
                "shared memory is watched in units of two bytes");
  using namespace emulator;
  Block& block = Block::current();
  T value;
  block.memory().read(address, &value, sizeof(T), sizeof(T),
                      block.access(Operation::kSharedLoad, where));
  return value;
}

template <typename T>
__device__ __forceinline__ void shared_store(
    T* address, T value, std::source_location where = std::source_location::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 2 == 0,
                "shared memory is watched in units of two bytes");
  using namespace emulator;
  Block& block = Block::current();
  block.memory().write(address, &value, sizeof(T), sizeof(T),
                       block.access(Operation::kSharedStore, where));
}

namespace emulator {

struct LdmatrixOperands {
  uint32_t* matrices;  // 4
  const void* row;
  Access access;
};

inline void load_matrices(LdmatrixOperands* const (&lanes)[32], SharedMemory& memory) {
  const bool transposed = lanes[0]->access.operation == Operation::kLdmatrixTransposed;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const LdmatrixOperands& lane = *lanes[8 * matrix + row];
      memory.read(lane.row, elements[row], 16, 16, lane.access);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t low = transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      lanes[lane]->matrices[matrix] = high << 16 | low;
    }
  }
}

inline void meet_for_ldmatrix(uint32_t (&matrices)[4], const void* row, Operation operation,
                              const std::source_location& where) {
  Block& block = Block::current();
  LdmatrixOperands operands{matrices, row, block.access(operation, where)};
  block.meet_warp(operands.access, operands,
                  [&](auto& lanes) { load_matrices(lanes, block.memory()); });
}

template <typename Scalar>
void meet_for_mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  const std::source_location& where) {
  Block& block = Block::current();
  MmaOperands operands{sum, a, {b0, b1}};
  block.meet_warp(block.access(Operation::kMma, where), operands,
                  [](auto& lanes) { multiply_add<Scalar>(lanes); });
}

// The source must be valid even where it is not read. AddressSanitizer tells for the first byte;
// where it is read, an access now rather than on arrival puts the line of the kernel in the report.
inline void check_source(const void* global, int bytes, bool valid, const Access& access) {
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    throw std::runtime_error(describe(access) + ": misaligned: the source is not a multiple of " +
                             std::to_string(bytes));
  }
  bool address_is_valid = global != nullptr;
#if defined(__SANITIZE_ADDRESS__)
  address_is_valid = address_is_valid && (valid || !__asan_address_is_poisoned(global));
#endif
  if (!address_is_valid) {
    throw std::runtime_error(describe(access) + ": the source is not a valid address");
  }
  if (!valid) return;
  volatile char probe;
  for (int i = 0; i < bytes; ++i) probe = static_cast<const char*>(global)[i];
  (void)probe;
}

}  // namespace emulator

__device__ __forceinline__ void ldmatrix(
    uint32_t (&matrices)[4], const void* row,
    std::source_location where = std::source_location::current()) {
  emulator::meet_for_ldmatrix(matrices, row, emulator::Operation::kLdmatrix, where);
}

__device__ __forceinline__ void ldmatrix_transposed(
    uint32_t (&matrices)[4], const void* row,
    std::source_location where = std::source_location::current()) {
  emulator::meet_for_ldmatrix(matrices, row, emulator::Operation::kLdmatrixTransposed, where);
}

__device__ __forceinline__ void count_unless_below(int& count, float a, float b) {
  count += !(a < b);
}

template <int kBytes>
__device__ __forceinline__ void cp_async(
    void* shared, const void* global, bool valid,
    std::source_location where = std::source_location::current()) {
  static_assert(kBytes == 8 || kBytes == 16);
  using namespace emulator;
  Block& block = Block::current();
  const Access access = block.access(Operation::kCopy, where);
  check_source(global, kBytes, valid, access);
  const size_t first = block.memory().begin_copy(shared, kBytes, access);
  block.copies().issue(valid ? global : nullptr, first, kBytes, block.random());
}

__device__ __forceinline__ void cp_async_commit() { emulator::Block::current().copies().commit(); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  emulator::Block& block = emulator::Block::current();
  block.copies().wait(kPending, block.memory());
}

template <typename Scalar>
__device__ __forceinline__ void mma_m16n8k16(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
    std::source_location where = std::source_location::current()) {
  static_assert(std::is_same_v<Scalar, BFloat16> || std::is_same_v<Scalar, Half>);
  emulator::meet_for_mma<Scalar>(sum, a, b0, b1, where);
}

__device__ __forceinline__ void mma_m16n8k8(
    float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
    std::source_location where = std::source_location::current()) {
  emulator::meet_for_mma<emulator::TF32>(sum, a, b0, b1, where);
}

template <typename T>
__device__ __forceinline__ T
shuffle_xor(T value, int mask, std::source_location where = std::source_location::current()) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) == 4);
  using namespace emulator;
  struct Operands {
    T value, received;
    int mask;
  } operands{value, value, mask};
  Block& block = Block::current();
  const Access access = block.access(Operation::kShuffle, where);
  if (mask < 0 || mask >= kWarpLanes) {
    throw std::runtime_error(describe(access) + ": no lane differs by " + std::to_string(mask));
  }
  block.meet_warp(access, operands, [](auto& lanes) {
    for (int i = 0; i < kWarpLanes; ++i) lanes[i]->received = lanes[i ^ lanes[i]->mask]->value;
  });
  return operands.received;
}

__device__ __forceinline__ bool warp_any(
    bool condition, std::source_location where = std::source_location::current()) {
  using namespace emulator;
  Block& block = Block::current();
  block.meet_warp(block.access(Operation::kAny, where), condition, [](auto& lanes) {
    bool any = false;
    for (const bool* lane : lanes) any |= *lane;
    for (bool* lane : lanes) *lane = any;
  });
  return condition;
}

__device__ __forceinline__ void warp_barrier(
    std::source_location where = std::source_location::current()) {
  emulator::Block& block = emulator::Block::current();
  int nothing = 0;
  block.meet_warp(block.access(emulator::Operation::kWarpBarrier, where), nothing, [](auto&) {});
}

__device__ __forceinline__ void block_barrier(
    std::source_location where = std::source_location::current()) {
  emulator::Block& block = emulator::Block::current();
  block.meet_block(block.access(emulator::Operation::kBarrier, where));
}

}  // namespace medmoco
