// Rows of an operand in shared memory, and the fragments that tensor cores take from them.

#pragma once

#include "operands.cuh"

namespace medmoco {

// Rows of kDim elements at an offset of the shared memory, in chunks of 16 bytes. Chunk c of row r
// lies at place c ^ (r % 8) of its row: so what a warp touches together, one chunk of eight rows or
// eight chunks of one, is in different banks. For two chunks of each of four rows, kSwizzle is 2:
// the place is then c ^ (2 (r % 8)).
template <typename Element, int kDim, int kSwizzle = 1>
struct Tile {
  static constexpr int kChunkElements = 16 / int(sizeof(Element));
  static constexpr int kRowBytes = kDim * int(sizeof(Element));
  static constexpr int kRowChunks = kRowBytes / 16;
  static_assert(kRowChunks % (8 * kSwizzle) == 0);

  int offset;

  __device__ __forceinline__ int place(int row, int chunk) const {
    return offset + row * kRowBytes + (chunk ^ (row & 7) * kSwizzle) * 16;
  }
  // From a place, `chunks` (whose bits are 0 in the chunk there) and then `rows` (a multiple of 8)
  // further. So a lane works out one place, and finds all others with an instruction or two.
  static __device__ __forceinline__ unsigned char* further(int place, int chunks, int rows) {
    return shared_memory() + (place ^ (chunks * 16)) + rows * kRowBytes;
  }
};

// Rows in global memory that cp_async can take: 16-byte aligned, of `chunks` whole chunks each.
template <typename Element>
struct AlignedRows {
  const Element* data;
  int64_t stride, count;
  int chunks;
};

// Starts to copy rows [first, first + kRows) into the tile, zeros beyond the last row and chunk.
// `anywhere` is an address that is valid even if there are no rows.
template <int kRows, int kThreads, typename Element, int kDim, int kSwizzle>
__device__ __forceinline__ void copy_rows(const AlignedRows<Element>& rows, int64_t first,
                                          Tile<Element, kDim, kSwizzle> tile,
                                          const void* anywhere) {
  using T = Tile<Element, kDim, kSwizzle>;
  constexpr int kRowsAtOnce = kThreads / T::kRowChunks;
  [[maybe_unused]] constexpr int kUnrolled =
      T::kRowBytes < 1024 ? 8 : 2;  // where rows are wide, registers are short
  static_assert(kThreads % T::kRowChunks == 0 && kRows % kRowsAtOnce == 0);
  const int thread = thread_id(), first_row = thread / T::kRowChunks,
            chunk = thread % T::kRowChunks;
  const int64_t left = chunk < rows.chunks ? rows.count - first : 0;
  const Element* source = rows.data + (first + first_row) * rows.stride + chunk * T::kChunkElements;
#pragma unroll kUnrolled
  for (int i = 0; i < kRows; i += kRowsAtOnce) {
    const bool valid = first_row + i < left;
    void* to = shared_memory() + tile.place(first_row + i, chunk);
    cp_async<16>(to, valid ? source : anywhere, valid);
    source += kRowsAtOnce * rows.stride;
  }
}

// Where a lane begins to read left operands, right operands with a row of the tile as a column, and
// right operands with a row of the tile as depth.
template <typename Element, int kDim>
__device__ __forceinline__ int left_place(Tile<Element, kDim> tile, int lane) {
  return tile.place(lane % 16, lane / 16);
}
template <typename Element, int kDim>
__device__ __forceinline__ int right_place(Tile<Element, kDim> tile, int lane) {
  return tile.place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
template <typename Element, int kDim>
__device__ __forceinline__ int values_place(Tile<Element, kDim> tile, int lane) {
  if constexpr (sizeof(Element) == 2) return left_place(tile, lane);
  return tile.place(lane % 4 * 2, lane / 16) + lane / 4 % 4 * 4;
}

// A left operand of 16 rows, or, from right_place, two right operands of 8: raw[0] and raw[1],
// raw[2] and raw[3].
template <typename T>
__device__ __forceinline__ void load_operand(uint32_t (&raw)[4], int place, int first_row,
                                             int step) {
  ldmatrix(raw, T::further(place, 2 * step, first_row));
}

// Two right operands with a row of the tile as depth, to follow left_of_results: rows of the step,
// columns [16 pair_of_columns, 16 pair_of_columns + 16).
template <typename T>
__device__ __forceinline__ void load_values(uint32_t (&raw)[4], int place, int step,
                                            int pair_of_columns) {
  if constexpr (T::kChunkElements == 8) {
    ldmatrix_transposed(raw, T::further(place, 2 * pair_of_columns, 16 * step));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // depths 2 pair and 2 pair + 1 of one operand, then of the other
      const auto* row = T::further(place, 4 * pair_of_columns + i / 2 * 2 + i % 2, 8 * step);
      raw[i] = shared_load(reinterpret_cast<const uint32_t*>(row + i % 2 * T::kRowBytes));
    }
  }
}

}  // namespace medmoco
