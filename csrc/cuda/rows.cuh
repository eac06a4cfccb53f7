// Rows of any strides, and their copy where a kernel needs them aligned.

#pragma once

#include "tile.cuh"

namespace medmoco {

// A matrix in global memory. Strides count elements.
template <typename Element>
struct Rows {
  const Element* data;
  int64_t count, dim, row_stride, column_stride;
};

template <typename Element>
constexpr int64_t padded_dim(int64_t dim) {
  constexpr int64_t chunk = 16 / sizeof(Element);
  return dim > 0 ? (dim + chunk - 1) / chunk * chunk : chunk;  // at least one, of zeros
}

template <typename Element>
bool is_aligned(const Rows<Element>& rows) {
  constexpr int64_t size = sizeof(Element);
  return rows.column_stride == 1 && rows.dim == padded_dim<Element>(rows.dim) &&
         rows.row_stride * size % 16 == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

constexpr int kPackThreads = 256;

template <typename Element>
__global__ void __launch_bounds__(kPackThreads)
    pack_rows_kernel(Rows<Element> rows, int64_t padded, Element* packed) {
  const int64_t step = int64_t(gridDim.x) * kPackThreads;
  for (int64_t i = int64_t(blockIdx.x) * kPackThreads + threadIdx.x; i < rows.count * padded;
       i += step) {
    const int64_t row = i / padded, column = i % padded;
    const Element* element = rows.data + row * rows.row_stride + column * rows.column_stride;
    packed[i] = column < rows.dim ? *element : Element{};
  }
}

// How many bytes align_rows needs: none for rows that are aligned as they are.
template <typename Element>
int64_t packed_bytes(const Rows<Element>& rows) {
  const int64_t bytes = rows.count * padded_dim<Element>(rows.dim) * int64_t(sizeof(Element));
  return is_aligned(rows) ? 0 : bytes;
}

// The rows themselves, or a copy of them, padded with zeros, in `packed`.
template <typename Element>
AlignedRows<Element> align_rows(const Rows<Element>& rows, void* packed, Stream stream) {
  const int64_t padded = padded_dim<Element>(rows.dim);
  const int chunks = int(padded * int64_t(sizeof(Element)) / 16);
  if (is_aligned(rows)) return {rows.data, rows.row_stride, rows.count, chunks};
  auto* copy = static_cast<Element*>(packed);
  const int64_t blocks = (rows.count * padded + kPackThreads - 1) / kPackThreads;
  launch("pack_rows", pack_rows_kernel<Element>, dim3(unsigned(blocks < 65536 ? blocks : 65536)),
         dim3(kPackThreads), 0, stream, rows, padded, copy);
  return {copy, padded, rows.count, chunks};
}

}  // namespace medmoco
