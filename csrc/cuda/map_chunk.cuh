// A piece of a feature map in shared memory: some positions, 128 bytes of channels of each. How it
// is copied there as the map lies, and how tensor cores take their operands from it.
//
// All layouts give the same lane the same channels of a step, so they give the same bits.

#pragma once

#include "feature_map.cuh"
#include "tile.cuh"

namespace medmoco {

constexpr int kMatchThreads = 128;
constexpr int kChunkDepthBytes = 128;
constexpr int kChunkSteps = kChunkDepthBytes / 32;
template <typename Element>
constexpr int kChunkDepth = kChunkDepthBytes / int(sizeof(Element));

// What to copy: `positions` and `channels` count those left from the first on.
template <typename Element>
struct MapWindow {
  const Element* image;      // its first element
  const Element* image_end;  // behind its last
  int64_t channel_stride, position_stride;
  int64_t first_channel, first_position, channels, positions;

  __device__ __forceinline__ static MapWindow of(const FeatureMap<Element>& map, int64_t channels,
                                                 int64_t image, int64_t first_channel,
                                                 int64_t first_position) {
    const Element* begin = map.data + image * map.batch_stride;
    const Element* last =
        begin + (channels - 1) * map.channel_stride + (map.positions - 1) * map.position_stride;
    return {
        begin,         last + 1,       map.channel_stride,       map.position_stride,
        first_channel, first_position, channels - first_channel, map.positions - first_position};
  }
  __device__ __forceinline__ const Element* first() const {
    return image + first_channel * channel_stride + first_position * position_stride;
  }
};

template <typename Element>
__device__ __forceinline__ int chunks_of(int64_t elements) {
  constexpr int kElements = 16 / int(sizeof(Element));
  return int((elements + kElements - 1) / kElements);
}

// kBytes: of shared memory. copy: starts the copy to an offset there. Reader: reads what has been
// copied; positions count from first_position, a multiple of 16.
template <typename Element, MapLayout kLayout, int kPositions>
struct MapChunk;

template <typename Element, int kPositions>
struct MapChunk<Element, MapLayout::kChannelsLast, kPositions> {
  using T = Tile<Element, kChunkDepth<Element>>;
  static constexpr int kBytes = kPositions * kChunkDepthBytes;

  static __device__ __forceinline__ void copy(const MapWindow<Element>& window, int offset,
                                              const void* anywhere) {
    const AlignedRows<Element> rows = {window.first(), window.position_stride, window.positions,
                                       chunks_of<Element>(window.channels)};
    copy_rows<kPositions, kMatchThreads>(rows, 0, T{offset}, anywhere);
  }

  struct Reader {
    int left_operand, right_operand;

    __device__ __forceinline__ Reader(int offset, int first_position, const MapWindow<Element>&) {
      const int lane = thread_id() % kWarpLanes, rows = first_position * kChunkDepthBytes;
      left_operand = left_place(T{offset}, lane) + rows;
      right_operand = right_place(T{offset}, lane) + rows;
    }
    __device__ __forceinline__ void left(uint32_t (&raw)[4], int m, int step) const {
      load_operand<T>(raw, left_operand, 16 * m, step);
    }
    __device__ __forceinline__ void right(uint32_t (&raw)[4], int n, int step) const {
      load_operand<T>(raw, right_operand, 8 * n, step);
    }
  };
};

template <typename Element, int kPositions>
struct MapChunk<Element, MapLayout::kChannelsFirst, kPositions> {
  // Transposed fragments take a chunk of eight rows; elements by themselves, two chunks of four.
  using T = Tile<Element, kPositions, sizeof(Element) == 2 ? 1 : 2>;
  static constexpr int kBytes = kPositions * kChunkDepthBytes;

  static __device__ __forceinline__ void copy(const MapWindow<Element>& window, int offset,
                                              const void* anywhere) {
    const AlignedRows<Element> rows = {window.first(), window.channel_stride, window.channels,
                                       chunks_of<Element>(window.positions)};
    copy_rows<kChunkDepth<Element>, kMatchThreads>(rows, 0, T{offset}, anywhere);
  }

  struct Reader {
    int left_operand, right_operand;

    __device__ __forceinline__ Reader(int offset, int first_position, const MapWindow<Element>&) {
      const int lane = thread_id() % kWarpLanes;
      const int chunks = first_position / T::kChunkElements * 16;
      if constexpr (sizeof(Element) == 2) {
        left_operand = T{offset}.place(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ chunks;
        right_operand = T{offset}.place(lane % 16, lane / 16) ^ chunks;
      } else {
        left_operand = (T{offset}.place(lane % 4, lane / 16) + lane / 4 % 4 * 4) ^ chunks;
        right_operand = left_operand;
      }
    }
    // The element of chunk `chunk` of the step: see mma.cuh.
    __device__ __forceinline__ uint32_t load(int step, int chunk, int position) const {
      // The row is four further for the other chunk, and its swizzle another.
      const int chunks = position / T::kChunkElements ^ chunk * T::kChunkElements * 2;
      const auto* row = T::further(left_operand, chunks, 8 * step) + 4 * chunk * T::kRowBytes;
      return shared_load(reinterpret_cast<const uint32_t*>(row));
    }
    __device__ __forceinline__ void left(uint32_t (&raw)[4], int m, int step) const {
      if constexpr (sizeof(Element) == 2) {
        ldmatrix_transposed(raw, T::further(left_operand, 2 * m, 16 * step));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[i] = load(step, i / 2, 16 * m + i % 2 * 8);
      }
    }
    __device__ __forceinline__ void right(uint32_t (&raw)[4], int n, int step) const {
      if constexpr (sizeof(Element) == 2) {
        ldmatrix_transposed(raw, T::further(right_operand, n, 16 * step));
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) raw[i] = load(step, i % 2, 8 * n + i / 2 * 8);
      }
    }
  };
};

// Each row of positions is copied from the aligned address below it on, so it begins up to 15 bytes
// into its row of the shared memory.
template <typename Element, int kPositions>
struct MapChunk<Element, MapLayout::kUnaligned, kPositions> {
  static constexpr int kSize = int(sizeof(Element));
  static constexpr int kRowBytes = kPositions * kSize + 8 * kSize;  // rows begin in other banks
  static constexpr int kRowChunks = kPositions * kSize / 16 + 1;
  static constexpr int kBytes = kChunkDepth<Element> * kRowBytes;

  static __device__ __forceinline__ void copy(const MapWindow<Element>& window, int offset,
                                              const void* anywhere) {
    const auto begin = reinterpret_cast<uintptr_t>(window.image);
    const auto end = reinterpret_cast<uintptr_t>(window.image_end);
    const auto first = reinterpret_cast<uintptr_t>(window.first());
    const int64_t bytes = (window.positions < kPositions ? window.positions : kPositions) * kSize;
    for (int i = thread_id(); i < kChunkDepth<Element> * kRowChunks; i += kMatchThreads) {
      const int row = i / kRowChunks, chunk = i % kRowChunks;
      const uintptr_t row_begin = first + row * window.channel_stride * kSize;
      const uintptr_t from = (row_begin & ~uintptr_t(15)) + chunk * 16;
      const bool valid = row < window.channels && from < row_begin + bytes;
      unsigned char* to = shared_memory() + offset + row * kRowBytes + chunk * 16;
      if (!valid || (from >= begin && from + 16 <= end)) {
        cp_async<16>(to, valid ? reinterpret_cast<const void*>(from) : anywhere, valid);
        continue;
      }
      for (int byte = 0; byte < 16; byte += kSize) {  // of the image's first or last chunk
        const bool inside = from + byte >= begin && from + byte < end;
        shared_store(reinterpret_cast<Element*>(to + byte),
                     inside ? *reinterpret_cast<const Element*>(from + byte) : Element{});
      }
    }
  }

  struct Reader {
    const unsigned char* operand;
    uint32_t head, head_step;  // where a row begins, from row to row

    __device__ __forceinline__ Reader(int offset, int first_position,
                                      const MapWindow<Element>& window) {
      operand = shared_memory() + offset + (first_position + thread_id() % kWarpLanes / 4) * kSize;
      head = uint32_t(reinterpret_cast<uintptr_t>(window.first()));
      head_step = uint32_t(window.channel_stride * kSize);
    }
    __device__ __forceinline__ const unsigned char* at(int row, int position) const {
      row += thread_id() % 4 * (4 / kSize);
      return operand + row * kRowBytes + ((head + row * head_step) & 15) + position * kSize;
    }
    // 32 bits of chunk `chunk` of the step: see mma.cuh.
    __device__ __forceinline__ uint32_t load(int step, int chunk, int position) const {
      if constexpr (kSize == 4) {
        return shared_load(reinterpret_cast<const uint32_t*>(at(8 * step + 4 * chunk, position)));
      } else {
        const int row = 16 * step + 8 * chunk;
        const uint32_t low = shared_load(reinterpret_cast<const uint16_t*>(at(row, position)));
        const uint32_t high = shared_load(reinterpret_cast<const uint16_t*>(at(row + 1, position)));
        return high << 16 | low;
      }
    }
    __device__ __forceinline__ void left(uint32_t (&raw)[4], int m, int step) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[i] = load(step, i / 2, 16 * m + i % 2 * 8);
    }
    __device__ __forceinline__ void right(uint32_t (&raw)[4], int n, int step) const {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[i] = load(step, i % 2, 8 * n + i / 2 * 8);
    }
  };
};

}  // namespace medmoco
