// Feature maps (batch, channels, positions) of any strides, how kernels read them, and their copy
// where no kernel can.

#pragma once

#include "primitives.cuh"

namespace medmoco {

// Strides count elements.
template <typename Element>
struct FeatureMap {
  const Element* data;
  int64_t batch_stride, channel_stride, position_stride, positions;
};

// How both maps of a kernel lie in memory.
enum class MapLayout {
  kChannelsLast,   // the channels of a position together, in aligned chunks of 16 bytes
  kChannelsFirst,  // the positions of a channel together, in aligned chunks of 16 bytes
  kUnaligned,      // the positions of a channel together, anywhere
};

constexpr int64_t kChunkBytes = 16;

template <typename Element>
bool has_aligned_chunks(const FeatureMap<Element>& map, int64_t row_stride, int64_t row_elements) {
  constexpr int64_t size = sizeof(Element);
  return map.batch_stride * size % kChunkBytes == 0 && row_stride * size % kChunkBytes == 0 &&
         row_elements * size % kChunkBytes == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % kChunkBytes == 0;
}

// Whether kernels for a layout can read the map as it lies.
template <typename Element>
bool lies_as(MapLayout layout, const FeatureMap<Element>& map, int64_t channels) {
  if (layout == MapLayout::kChannelsLast) {
    return map.channel_stride == 1 && has_aligned_chunks(map, map.position_stride, channels);
  }
  if (map.position_stride != 1) return false;
  return layout == MapLayout::kUnaligned ||
         has_aligned_chunks(map, map.channel_stride, map.positions);
}

// The layout that leaves most maps where they are.
template <typename Element>
MapLayout choose_layout(const FeatureMap<Element>& query, const FeatureMap<Element>& key,
                        int64_t channels) {
  auto lie_as = [&](MapLayout layout) {
    return int(lies_as(layout, query, channels)) + int(lies_as(layout, key, channels));
  };
  const int first = lie_as(MapLayout::kChannelsFirst), any = lie_as(MapLayout::kUnaligned);
  if (lie_as(MapLayout::kChannelsLast) > any) return MapLayout::kChannelsLast;
  return any > first ? MapLayout::kUnaligned : MapLayout::kChannelsFirst;
}

constexpr int kPackMapThreads = 256;

// Copies to (batch, rows, padded) with rows of positions or of channels, zeros up to `padded`.
template <typename Element>
__global__ void __launch_bounds__(kPackMapThreads)
    pack_map_kernel(FeatureMap<Element> map, int64_t batch, int64_t rows, int64_t columns,
                    int64_t row_stride, int64_t column_stride, int64_t padded, Element* packed) {
  const int64_t step = int64_t(gridDim.x) * kPackMapThreads;
  for (int64_t i = int64_t(blockIdx.x) * kPackMapThreads + threadIdx.x; i < batch * rows * padded;
       i += step) {
    const int64_t column = i % padded, row = i / padded % rows, image = i / padded / rows;
    packed[i] = column < columns
                    ? map.data[image * map.batch_stride + row * row_stride + column * column_stride]
                    : Element{};
  }
}

// A map that kernels for the layout can read: itself, or a copy of it.
template <typename Element>
struct ReadableMap {
  bool copied, channels_last;
  int64_t rows, columns, padded;  // of an image

  static ReadableMap of(MapLayout layout, const FeatureMap<Element>& map, int64_t channels) {
    constexpr int64_t chunk = kChunkBytes / sizeof(Element);
    const bool last = layout == MapLayout::kChannelsLast;
    const int64_t columns = last ? channels : map.positions;
    return {!lies_as(layout, map, channels), last, last ? map.positions : channels, columns,
            (columns + chunk - 1) / chunk * chunk};
  }
  int64_t bytes(int64_t batch) const {
    return copied ? batch * rows * padded * int64_t(sizeof(Element)) : 0;
  }
  FeatureMap<Element> copy_to(void* memory, const FeatureMap<Element>& map, int64_t batch,
                              Stream stream) const {
    if (!copied) return map;
    auto* packed = static_cast<Element*>(memory);
    const int64_t blocks = (batch * rows * padded + kPackMapThreads - 1) / kPackMapThreads;
    launch("pack_map", pack_map_kernel<Element>, dim3(unsigned(blocks < 65536 ? blocks : 65536)),
           dim3(kPackMapThreads), 0, stream, map, batch, rows, columns,
           channels_last ? map.position_stride : map.channel_stride,
           channels_last ? map.channel_stride : map.position_stride, padded, packed);
    return {packed, rows * padded, channels_last ? 1 : padded, channels_last ? padded : 1,
            map.positions};
  }
};

}  // namespace medmoco
