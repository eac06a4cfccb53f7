// Matrix products on panels, included inside the namespaces of for_each_instruction_set.h.
//
// A panel is a few vectors of rows side by side: lane = row. Stored with the summed dimension as
// the slow axis, it is multiplied by elements of the other operand one at a time, in the order in
// which that one lies in memory, row-major or its transpose: the other operand is never rearranged.

#include "lanes.inl"

constexpr int kPanelVectors = 2;
template <typename T>
constexpr int kPanelRows = kPanelVectors * kLanes<T>;
// Accumulators, two vectors each, plus two operands and a broadcast fill the registers.
constexpr int kRegisterBlock = kVectorRegisters == 32 ? 12 : 6;
// Sums of products are taken in stretches of this length, which keeps their rounding small.
constexpr int64_t kDepthBlock = 256;

// out[m][lane] += sum_k a(m, k) * b[k][lane] for `Rows` values of m, with
// a(m, k) = a[m * stride + k], or a[m + k * stride] when transposed.
template <typename T, int Rows, bool Transposed>
inline void multiply_block(const T* a, int64_t stride, const T* b, int64_t depth, T* out) {
  using Vector = typename LanesOf<T>::Vector;
  Vector sum[Rows][kPanelVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector lanes[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      lanes[v] = load(b + k * kPanelRows<T> + v * kLanes<T>);
    }
    for (int m = 0; m < Rows; ++m) {
      const T element = Transposed ? a[m + k * stride] : a[m * stride + k];
      for (int v = 0; v < kPanelVectors; ++v) sum[m][v] += element * lanes[v];
    }
  }
  for (int m = 0; m < Rows; ++m) {
    for (int v = 0; v < kPanelVectors; ++v) {
      T* place = out + m * kPanelRows<T> + v * kLanes<T>;
      store(place, load(place) + sum[m][v]);
    }
  }
}

template <typename T, bool Transposed>
inline void multiply(const T* a, int64_t rows, int64_t stride, const T* b, int64_t depth, T* out) {
  for (int64_t start = 0; start < depth; start += kDepthBlock) {
    const int64_t length = depth - start < kDepthBlock ? depth - start : kDepthBlock;
    const T* block = a + (Transposed ? start * stride : start);
    const T* lanes = b + start * kPanelRows<T>;
    const int64_t step = Transposed ? 1 : stride;
    int64_t m = 0;
    auto blocks = [&]<int Rows>(std::integral_constant<int, Rows>) {
      for (; m + Rows <= rows; m += Rows) {
        multiply_block<T, Rows, Transposed>(block + m * step, stride, lanes, length,
                                            out + m * kPanelRows<T>);
      }
    };
    blocks(std::integral_constant<int, kRegisterBlock>());
    blocks(std::integral_constant<int, kRegisterBlock * 2 / 3>());
    blocks(std::integral_constant<int, kRegisterBlock / 3>());
    blocks(std::integral_constant<int, 1>());
  }
}
