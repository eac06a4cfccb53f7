// Eigenvalues and eigenvectors of one small symmetric matrix, by a block of threads in its shared
// memory.
//
// Jacobi's method with parallel rotations (Golub & Van Loan, "Matrix Computations", 8.5): in each
// round the indices are paired, every pair gets the rotation that takes its element off the
// diagonal to zero, and all rotations are applied at once. In a sweep of rounds every pair meets
// once. The pairs of neighbouring lanes are neighbours too, so what a warp touches together lies in
// different banks.

#pragma once

#include "operands.cuh"

namespace medmoco {

constexpr int kLargestEighSize = 128;
constexpr int kMostSweeps = 30;  // eight or nine do, a dozen where the rank is low

// Turns (x, y) by an angle of at most 45 degrees. Written by its sine and the tangent of its half,
// a small turn adds little to what is there, and so loses little.
struct alignas(8) Rotation {
  float sine, half_tangent;

  // Takes a symmetric [[pp, pq], [pq, qq]] to diagonal form; `tangent` is that of the whole angle.
  __device__ __forceinline__ static Rotation of(float pp, float pq, float qq, float& tangent) {
    const float difference = qq - pp, twice = 2 * pq;
    const float root = sqrtf(difference * difference + twice * twice);
    tangent = twice / (difference < 0 ? difference - root : difference + root);
    const float secant = sqrtf(fmaf(tangent, tangent, 1.0f));
    return {tangent / secant, tangent / (1 + secant)};
  }
  __device__ __forceinline__ void turn(float& x, float& y) const {
    const float old = x;
    x = fmaf(-sine, fmaf(half_tangent, old, y), old);
    y = fmaf(sine, fmaf(-half_tangent, y, old), y);
  }
};

// What eigh works on, at the beginning of the shared memory: sides are even, an odd size has a row
// and a column of zeros more.
struct EighShared {
  int size;

  __host__ __device__ int side() const { return size + size % 2; }
  __device__ int pairs() const { return side() / 2; }
  __device__ float* matrix() const { return reinterpret_cast<float*>(shared_memory()); }
  __device__ float* vectors() const { return matrix() + side() * side(); }
  __device__ Rotation* rotations() const {
    return reinterpret_cast<Rotation*>(vectors() + side() * side());
  }
  // For each warp.
  __device__ int* flags() const { return reinterpret_cast<int*>(rotations() + pairs()); }
  __host__ __device__ int bytes(int threads) const {
    return 4 * (2 * side() * side() + side() + threads / 32);
  }
};

struct IndexPair {
  int p, q;
};

// Pair `k` of a round: one player stays, the others move on by one.
__device__ __forceinline__ IndexPair pair_of(int round, int k, int side) {
  const int players = side - 1, ahead = round + k, behind = round - k;
  if (k == 0) return {round, players};
  return {ahead < players ? ahead : ahead - players, behind < 0 ? behind + players : behind};
}

// Whether any thread of the block says so. Two calls must have a barrier between them.
template <int kThreads>
__device__ __forceinline__ bool block_any(bool condition, int* flags) {
  const bool any = warp_any(condition);
  const int thread = thread_id();
  if (thread % kWarpLanes == 0) shared_store(flags + thread / kWarpLanes, int(any));
  block_barrier();  // all flags are there
  int count = 0;
  for (int warp = 0; warp < kThreads / kWarpLanes; ++warp) count += shared_load(flags + warp);
  return count > 0;
}

// The largest element of the diagonal, which of a positive semidefinite matrix is the largest of
// all; for every thread.
__device__ __forceinline__ float largest_on_diagonal(const EighShared& shared) {
  float largest = 0;
  for (int i = thread_id() % kWarpLanes; i < shared.size; i += kWarpLanes) {
    largest = fmaxf(largest, fabsf(shared_load(shared.matrix() + i * (shared.side() + 1))));
  }
  for (int mask = 1; mask < kWarpLanes; mask *= 2) {
    largest = fmaxf(largest, shuffle_xor(largest, mask));
  }
  return largest;
}

// Rotations of a round, and the elements that they themselves change. Returns whether this
// thread's rotation was larger than rounding; smaller ones are left out.
__device__ __forceinline__ bool choose_rotation(const EighShared& shared, int round) {
  constexpr float kRounding = 0x1p-24f;  // beside the two of the diagonal
  constexpr float kNoise = 0x1p-30f;     // beside the largest, which is near 1
  const int k = thread_id();
  if (k >= shared.pairs()) return false;
  const int side = shared.side();
  const auto [p, q] = pair_of(round, k, side);
  float* pp = shared.matrix() + p * (side + 1);
  float* qq = shared.matrix() + q * (side + 1);
  float* pq = shared.matrix() + p * side + q;
  float* qp = shared.matrix() + q * side + p;
  const float here = shared_load(pp), there = shared_load(qq), coupling = shared_load(pq);
  const bool large =
      fabsf(coupling) > kNoise && coupling * coupling > kRounding * kRounding * fabsf(here * there);
  Rotation rotation{0, 0};
  if (large) {
    float tangent;
    rotation = Rotation::of(here, coupling, there, tangent);
    shared_store(pp, fmaf(-tangent, coupling, here));
    shared_store(qq, fmaf(tangent, coupling, there));
    shared_store(pq, 0.0f);
    shared_store(qp, 0.0f);
  }
  shared_store(shared.rotations() + k, rotation);
  return large;
}

// Applies the rotations of a round: to rows and columns of the matrix, to rows of the vectors. A
// thread works on the 2 x 2 elements where a pair of rows meets a pair of columns.
template <int kThreads>
__device__ __forceinline__ void apply_rotations(const EighShared& shared, int round) {
  const int side = shared.side(), pairs = shared.pairs();
  const int warp = thread_id() / kWarpLanes, lane = thread_id() % kWarpLanes;
  for (int column = lane; column < pairs; column += kWarpLanes) {
    const auto right = shared_load(shared.rotations() + column);
    const auto [left_column, right_column] = pair_of(round, column, side);
    for (int row = warp; row < pairs; row += kThreads / kWarpLanes) {
      const auto left = shared_load(shared.rotations() + row);
      const bool turns_rows = left.sine != 0, turns_columns = right.sine != 0;
      if (!turns_rows && !turns_columns) continue;
      const auto [upper_row, lower_row] = pair_of(round, row, side);
      const int upper = upper_row * side, lower = lower_row * side;
      float* matrix = shared.matrix();
      float* vectors = shared.vectors();
      // All is loaded before anything is stored: the compiler could not tell them apart.
      float a = shared_load(matrix + upper + left_column);
      float b = shared_load(matrix + upper + right_column);
      float c = shared_load(matrix + lower + left_column);
      float d = shared_load(matrix + lower + right_column);
      if (turns_rows) {
        float e = shared_load(vectors + upper + left_column);
        float f = shared_load(vectors + upper + right_column);
        float g = shared_load(vectors + lower + left_column);
        float h = shared_load(vectors + lower + right_column);
        left.turn(e, g);
        left.turn(f, h);
        shared_store(vectors + upper + left_column, e);
        shared_store(vectors + upper + right_column, f);
        shared_store(vectors + lower + left_column, g);
        shared_store(vectors + lower + right_column, h);
      }
      if (row == column) continue;  // see choose_rotation
      left.turn(a, c);
      left.turn(b, d);
      right.turn(a, b);
      right.turn(c, d);
      shared_store(matrix + upper + left_column, a);
      shared_store(matrix + upper + right_column, b);
      shared_store(matrix + lower + left_column, c);
      shared_store(matrix + lower + right_column, d);
    }
  }
}

struct Eigenvalues {
  bool found;
  float unit;  // of the diagonal on which they are left
};

// The caller has stored the matrix, symmetric and finite, and zeros where an odd size is filled up.
// Eigenvalue k is left at element (k, k) of it, times `unit`, and its vector in row k of `vectors`,
// in no order. Unless the last of `most_sweeps` finds all of them, which finite matrices have never
// failed to do, they are not found.
template <int kThreads>
__device__ __forceinline__ Eigenvalues eigh(const EighShared& shared, int most_sweeps) {
  static_assert(kThreads >= kLargestEighSize / 2, "a thread for each pair");
  block_barrier();  // the matrix is there
  // A power of two takes the largest near 1: squares neither overflow nor vanish.
  const uint32_t exponent = bits_of(largest_on_diagonal(shared)) >> 23;
  const uint32_t bounded = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
  const float towards_one = float_of((254 - bounded) << 23);
  block_barrier();  // nobody reads the diagonal that was
  const int side = shared.side();
  for (int i = thread_id(); i < side * side; i += kThreads) {
    shared_store(shared.matrix() + i, shared_load(shared.matrix() + i) * towards_one);
    shared_store(shared.vectors() + i, i % (side + 1) == 0 ? 1.0f : 0.0f);
  }
  block_barrier();  // for the first round
  for (int sweep = 0; sweep < most_sweeps; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < side - 1; ++round) {
      rotated |= choose_rotation(shared, round);
      block_barrier();  // rotations are there
      apply_rotations<kThreads>(shared, round);
      block_barrier();  // nobody reads them, and the next may be chosen
    }
    if (!block_any<kThreads>(rotated, shared.flags())) return {true, float_of(bounded << 23)};
  }
  return {false, 0};
}

}  // namespace medmoco
