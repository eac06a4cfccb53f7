// Vectors of as many float or double lanes as the instruction set holds, included inside the
// namespaces of for_each_instruction_set.h.

template <typename T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
  // 2^f, |f| <= 1/2, by its Taylor series: the first term left out is 5e-9.
  static constexpr int kExponentShift = 23, kExponentBias = 127, kDegree = 7;
};
template <>
struct LanesOf<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
  static constexpr int kExponentShift = 52, kExponentBias = 1023, kDegree = 13;  // 4e-18
};

template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <typename T>
inline typename LanesOf<T>::Vector load(const T* from) {
  typename LanesOf<T>::Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <typename T>
inline void store(T* to, typename LanesOf<T>::Vector vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// 2^x: zero below the smallest normal number, NaN for NaN; x is never so large as to overflow.
template <typename T>
inline typename LanesOf<T>::Vector exp2_lanes(typename LanesOf<T>::Vector x) {
  using Lanes = LanesOf<T>;
  using Vector = typename Lanes::Vector;
  using Mask = typename Lanes::Mask;
  constexpr double kLn2 = 0.693147180559945309417232121458;
  constexpr T lowest = 1 - Lanes::kExponentBias;
  // Adding 1.5 * 2^mantissa_bits rounds to an integer and leaves it in the low bits.
  constexpr T magic = T(3) * T(int64_t(1) << (Lanes::kExponentShift - 1));
  const Mask underflow = x < lowest;
  const Vector clamped = underflow ? Vector{} + lowest : x;
  const Vector shifted = clamped + magic;
  const Vector fraction = clamped - (shifted - magic);
  Vector series = Vector{};
  for (int k = Lanes::kDegree; k >= 0; --k) {
    double coefficient = 1;  // ln2^k / k!, folded by the compiler
    for (int i = 1; i <= k; ++i) coefficient *= kLn2 / i;
    series = series * fraction + T(coefficient);
  }
  const Vector magic_lanes = Vector{} + magic;
  const Mask exponent = (Mask)shifted - (Mask)magic_lanes + Lanes::kExponentBias;
  const Vector scaled = series * (Vector)(exponent << Lanes::kExponentShift);
  return underflow ? Vector{} : scaled;
}

// Takes one lane of a and b in turn, from lane First of each on.
template <typename T, int First, int... Lane>
inline typename LanesOf<T>::Vector interleave(typename LanesOf<T>::Vector a,
                                              typename LanesOf<T>::Vector b,
                                              std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (First + Lane / 2 + Lane % 2 * kLanes<T>)...);
#else
  using Mask = typename LanesOf<T>::Mask;
  return __builtin_shuffle(a, b, Mask{(First + Lane / 2 + Lane % 2 * kLanes<T>)...});
#endif
}

// square[i][j] = square[j][i]. Each pass interleaves the halves, which moves the top bit of the row
// to the bottom of the column; after as many passes as there are bits they have changed places.
template <typename T>
inline void transpose(typename LanesOf<T>::Vector (&square)[kLanes<T>]) {
  constexpr int kHalf = kLanes<T> / 2;
  constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>();
  for (int bit = 1; bit < kLanes<T>; bit *= 2) {
    typename LanesOf<T>::Vector next[kLanes<T>];
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<T, 0>(square[i], square[i + kHalf], lanes);
      next[2 * i + 1] = interleave<T, kHalf>(square[i], square[i + kHalf], lanes);
    }
    for (int i = 0; i < kLanes<T>; ++i) square[i] = next[i];
  }
}
