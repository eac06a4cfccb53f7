// Eigendecomposition of small symmetric matrices, included after lanes.inl and aligned.h.
//
// Householder reflections to tridiagonal form, then implicit QL steps (Golub & Van Loan, "Matrix
// Computations", 8.3). Reflections and rotations of the eigenvectors are vectorised within a
// matrix. What QL does to the tridiagonal is one chain of square roots and divisions, so it is
// taken for several matrices at once, lane = matrix, in double.

constexpr int kMatrices = kLanes<double>;
constexpr int kMostSteps = 60;  // for one eigenvalue; two or three do
// What a QL step leaves for zero in a matrix whose largest entry is 1. Eigenvalues without variance
// are nothing but such noise, and never small beside each other.
constexpr double kNoise = std::numeric_limits<double>::epsilon();

// Matrices of `size`, rows padded with zeros to whole vectors.
template <typename T>
struct Eigenproblem {
  int64_t size, stride;
  AlignedVector<T> vectors;               // [matrix][row][column], see each step
  AlignedVector<T> reflector, product;    // [column]
  AlignedVector<double> diagonal, below;  // [row][matrix]
  AlignedVector<double> cosine, sine;     // [row][matrix], of one QL step

  explicit Eigenproblem(int64_t n)
      : size(n),
        stride((n + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        vectors(kMatrices * n * stride),
        reflector(stride),
        product(stride),
        diagonal(n * kMatrices),
        below(n * kMatrices),
        cosine(n * kMatrices),
        sine(n * kMatrices) {}

  T* matrix(int64_t lane) { return vectors.data() + lane * size * stride; }
};

// to += sum over rows [first, size) of weight[row] * matrix[row], from column `start` on.
template <typename T>
inline void add_rows(const T* matrix, const T* weight, int64_t first, int64_t size, int64_t start,
                     int64_t stride, T* to) {
  for (int64_t c = start; c < stride; c += kLanes<T>) {
    typename LanesOf<T>::Vector even = {}, odd = {};
    int64_t row = first;
    for (; row + 2 <= size; row += 2) {
      even += weight[row] * load(matrix + row * stride + c);
      odd += weight[row + 1] * load(matrix + (row + 1) * stride + c);
    }
    if (row < size) even += weight[row] * load(matrix + row * stride + c);
    store(to + c, even + odd);
  }
}

// Takes a matrix to tridiagonal form. Row k is left holding the reflector of step k, with its
// factor in column k: the reflection is 1 - factor v v^T.
template <typename T>
void tridiagonalise(Eigenproblem<T>& problem, int64_t lane) {
  const int64_t size = problem.size, stride = problem.stride;
  T* matrix = problem.matrix(lane);
  T* product = problem.product.data();
  T* v = problem.reflector.data();
  for (int64_t k = 0; k < size; ++k) {
    T* row = matrix + k * stride;
    problem.diagonal[k * kMatrices + lane] = row[k];
    problem.below[k * kMatrices + lane] = k + 1 < size ? double(row[k + 1]) : 0.0;
    row[k] = 0;
    double rest = 0;
    for (int64_t c = k + 2; c < size; ++c) rest += double(row[c]) * row[c];
    if (rest < std::numeric_limits<T>::min()) continue;
    const double head = row[k + 1];
    const double norm = head > 0 ? -std::sqrt(head * head + rest) : std::sqrt(head * head + rest);
    const double factor = (norm - head) / norm;
    for (int64_t c = 0; c < stride; ++c) v[c] = c > k + 1 ? T(row[c] / (head - norm)) : T(0);
    v[k + 1] = 1;
    problem.below[k * kMatrices + lane] = norm;
    const int64_t start = (k + 1) / kLanes<T> * kLanes<T>;
    add_rows(matrix, v, k + 1, size, start, stride, product);
    double overlap = 0;
    for (int64_t c = k + 1; c < size; ++c) overlap += double(product[c]) * v[c];
    for (int64_t c = start; c < stride; ++c) {
      product[c] = c > k ? T(factor * (product[c] - factor / 2 * overlap * v[c])) : T(0);
    }
    for (int64_t r = k + 1; r < size; ++r) {
      for (int64_t c = start; c < stride; c += kLanes<T>) {
        T* place = matrix + r * stride + c;
        store(place, load(place) - v[r] * load(product + c) - product[r] * load(v + c));
      }
    }
    std::memcpy(row, v, stride * sizeof(T));
    row[k] = T(factor);
  }
}

// Multiplies out the reflections: row i becomes the i-th column of their product.
template <typename T>
void multiply_reflectors(Eigenproblem<T>& problem, int64_t lane) {
  const int64_t size = problem.size, stride = problem.stride;
  T* matrix = problem.matrix(lane);
  T* product = problem.product.data();
  T* v = problem.reflector.data();
  for (int64_t k = size - 1; k >= 0; --k) {
    // Below row k stands the product so far, which leaves rows and columns up to k alone.
    T* row = matrix + k * stride;
    const T factor = row[k];
    std::memcpy(v, row, stride * sizeof(T));
    v[k] = 0;
    std::memset(row, 0, stride * sizeof(T));
    row[k] = 1;
    if (factor == 0) continue;
    const int64_t start = (k + 1) / kLanes<T> * kLanes<T>;
    add_rows(matrix, v, k + 1, size, start, stride, product);
    for (int64_t r = k + 1; r < size; ++r) {
      const T weight = factor * v[r];
      for (int64_t c = start; c < stride; c += kLanes<T>) {
        T* place = matrix + r * stride + c;
        store(place, load(place) - weight * load(product + c));
      }
    }
  }
  for (int64_t r = 0; r < size; ++r) {
    for (int64_t c = 0; c < r; ++c) {
      const T swapped = matrix[r * stride + c];
      matrix[r * stride + c] = matrix[c * stride + r];
      matrix[c * stride + r] = swapped;
    }
  }
}

// Rotates rows `last` and last - 1, then last - 1 and last - 2, down to first + 1 and `first`.
template <typename T>
inline void rotate_rows(Eigenproblem<T>& problem, int64_t lane, int64_t first, int64_t last) {
  const int64_t stride = problem.stride;
  for (int64_t c = 0; c < stride; c += kLanes<T>) {
    T* column = problem.matrix(lane) + c;
    typename LanesOf<T>::Vector upper = load(column + last * stride);
    for (int64_t i = last - 1; i >= first; --i) {
      const T cosine = T(problem.cosine[i * kMatrices + lane]);
      const T sine = T(problem.sine[i * kMatrices + lane]);
      const auto lower = load(column + i * stride);
      store(column + (i + 1) * stride, sine * lower + cosine * upper);
      upper = cosine * lower - sine * upper;
    }
    store(column + first * stride, upper);
  }
}

// What `last` of a lane has beyond the estimate of the eigenvalue at `first`, from the 2x2 block
// there.
template <typename T>
inline double beyond_shift(const Eigenproblem<T>& problem, int64_t lane, int64_t first,
                           int64_t last) {
  const double* d = problem.diagonal.data() + lane;
  const double here = d[first * kMatrices];
  const double coupling = problem.below[first * kMatrices + lane];
  const double half = (d[(first + 1) * kMatrices] - here) / (2 * coupling);
  const double root = std::sqrt(half * half + 1);
  return d[last * kMatrices] - here + coupling / (half < 0 ? half - root : half + root);
}

// One implicit QL step from row `last` of each lane up to row `first`. Lanes whose last is `first`
// are left alone.
template <typename T>
void take_ql_step(Eigenproblem<T>& problem, int64_t first, const int64_t* last) {
  using Vector = LanesOf<double>::Vector;
  using Mask = LanesOf<double>::Mask;
  double* d = problem.diagonal.data();
  double* e = problem.below.data();
  alignas(64) double shifted[kMatrices];
  int64_t most = first;
  for (int lane = 0; lane < kMatrices; ++lane) {
    most = last[lane] > most ? last[lane] : most;
    shifted[lane] = last[lane] > first ? beyond_shift(problem, lane, first, last[lane]) : 0;
  }
  Mask ends;
  std::memcpy(&ends, last, sizeof ends);
  const Vector one = Vector{} + 1.0;
  Vector g = load(shifted), sine = one, cosine = one, p = {};
  for (int64_t i = most - 1; i >= first; --i) {
    const Mask active = ends > i;
    const Vector here = load(d + i * kMatrices), next = load(d + (i + 1) * kMatrices);
    const Vector coupling = load(e + i * kMatrices), next_coupling = load(e + (i + 1) * kMatrices);
    const Vector f = sine * coupling, b = cosine * coupling;
    const Vector squares = f * f + g * g;
    alignas(64) double roots[kMatrices];
    store(roots, squares);
    for (int lane = 0; lane < kMatrices; ++lane) roots[lane] = std::sqrt(roots[lane]);
    const Vector root = load(roots);
    const Mask vanished = root == 0.0;
    const Vector inverse = one / (vanished ? one : root);
    const Vector new_sine = f * inverse, new_cosine = vanished ? one : g * inverse;
    const Vector left = next - p;
    const Vector turned = (here - left) * new_sine + 2 * new_cosine * b;
    const Vector new_p = new_sine * turned;
    store(e + (i + 1) * kMatrices, active ? root : next_coupling);
    store(d + (i + 1) * kMatrices, active ? left + new_p : next);
    store(problem.sine.data() + i * kMatrices, new_sine);
    store(problem.cosine.data() + i * kMatrices, new_cosine);
    g = active ? new_cosine * turned - b : g;
    p = active ? new_p : p;
    sine = active ? new_sine : sine;
    cosine = active ? new_cosine : cosine;
  }
  const Mask moved = ends > first;
  store(d + first * kMatrices, load(d + first * kMatrices) - (moved ? p : Vector{}));
  store(e + first * kMatrices, moved ? g : load(e + first * kMatrices));
  for (int lane = 0; lane < kMatrices; ++lane) {
    if (last[lane] == first) continue;
    e[last[lane] * kMatrices + lane] = 0;
    rotate_rows(problem, lane, first, last[lane]);
  }
}

// The first row from `first` on, in each lane, that a rounding couples to the next; that row at
// last.
template <typename T>
inline LanesOf<double>::Mask find_splits(const Eigenproblem<T>& problem, int64_t first) {
  using Vector = LanesOf<double>::Vector;
  using Mask = LanesOf<double>::Mask;
  const double* d = problem.diagonal.data();
  const double* e = problem.below.data();
  const auto magnitude = [](Vector x) { return x < 0.0 ? -x : x; };
  Mask split = Mask{} + (problem.size - 1), open = ~Mask{};
  for (int64_t row = first; row + 1 < problem.size; ++row) {
    const Vector near =
        magnitude(load(d + row * kMatrices)) + magnitude(load(d + (row + 1) * kMatrices));
    const double rounding = std::numeric_limits<T>::epsilon() / 2;
    const Mask small = magnitude(load(e + row * kMatrices)) <= rounding * near + kNoise;
    split = (open & small) ? Mask{} + row : split;
    open &= ~small;
  }
  return split;
}

// Decomposes the first `count` matrices: the eigenvalues are left in `diagonal`, in no order, the
// i-th eigenvector in row i of `vectors`. False if QL does not converge.
template <typename T>
bool diagonalise(Eigenproblem<T>& problem, int64_t count) {
  problem.diagonal.assign(problem.size * kMatrices, 0.0);
  problem.below.assign(problem.size * kMatrices, 0.0);
  for (int64_t lane = 0; lane < count; ++lane) {
    tridiagonalise(problem, lane);
    multiply_reflectors(problem, lane);
  }
  for (int64_t first = 0; first < problem.size; ++first) {
    for (int step = 0;; ++step) {
      const LanesOf<double>::Mask split = find_splits(problem, first);
      int64_t last[kMatrices];
      std::memcpy(last, &split, sizeof last);
      bool done = true;
      for (int64_t row : last) done &= row == first;
      if (done) break;
      if (step == kMostSteps) return false;
      take_ql_step(problem, first, last);
    }
  }
  return true;
}

// Eigenvalues (count, size), in no order, and eigenvectors (count, size, size), in columns, of
// finite symmetric matrices. False if they are not found.
template <typename T>
bool eigh_kernel(const T* matrices, int64_t count, int64_t size, T* values, T* vectors) {
  Eigenproblem<T> problem(size);
  const int64_t area = size * size;
  double scales[kMatrices];
  for (int64_t start = 0; start < count; start += kMatrices) {
    const int64_t lanes = count - start < kMatrices ? count - start : kMatrices;
    std::memset(problem.vectors.data(), 0, problem.vectors.size() * sizeof(T));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T* from = matrices + (start + lane) * area;
      T largest = 0;  // scaled to 1, squares neither overflow nor vanish
      for (int64_t i = 0; i < area; ++i)
        largest = std::fabs(from[i]) > largest ? std::fabs(from[i]) : largest;
      scales[lane] = largest < std::numeric_limits<T>::min() ? 1.0 : double(largest);
      for (int64_t i = 0; i < size; ++i) {
        T* to = problem.matrix(lane) + i * problem.stride;
        for (int64_t j = 0; j < size; ++j) to[j] = T(from[i * size + j] / scales[lane]);
      }
    }
    if (!diagonalise(problem, lanes)) return false;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      T* to = vectors + (start + lane) * area;
      for (int64_t i = 0; i < size; ++i) {
        values[(start + lane) * size + i] =
            T(problem.diagonal[i * kMatrices + lane] * scales[lane]);
        for (int64_t j = 0; j < size; ++j) {
          to[i * size + j] = problem.matrix(lane)[j * problem.stride + i];
        }
      }
    }
  }
  return true;
}
