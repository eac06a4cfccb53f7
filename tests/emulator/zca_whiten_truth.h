// zca_whiten and its gradient in float64, written as the formulas are.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace medmoco::test {

struct WhitenTruth {
  std::vector<double> whitened, mean, matrix, grad_features;
  std::vector<double> grad_times_matrix;  // a term of the gradient, which the other may cancel
};

// Square and row-major.
struct Square {
  int size;
  std::vector<double> values;

  explicit Square(int size) : size(size), values(size_t(size) * size) {}
  double& at(int i, int j) { return values[i * size + j]; }
  double at(int i, int j) const { return values[i * size + j]; }
};

inline Square product(const Square& a, const Square& b, bool transposed_a = false,
                      bool transposed_b = false) {
  Square c(a.size);
  for (int i = 0; i < a.size; ++i) {
    for (int k = 0; k < a.size; ++k) {
      const double left = transposed_a ? a.at(k, i) : a.at(i, k);
      for (int j = 0; j < a.size; ++j) {
        c.at(i, j) += left * (transposed_b ? b.at(j, k) : b.at(k, j));
      }
    }
  }
  return c;
}

// Takes `a` to its eigenvalues on the diagonal, one pair after the other; returns the eigenvectors
// in columns.
inline Square diagonalise(Square& a) {
  const int n = a.size;
  Square vectors(n);
  for (int i = 0; i < n; ++i) vectors.at(i, i) = 1;
  for (int sweep = 0; sweep < 16; ++sweep) {
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        if (std::abs(a.at(p, q)) < 1e-300) continue;
        const double angle = 0.5 * std::atan2(2 * a.at(p, q), a.at(q, q) - a.at(p, p));
        const double c = std::cos(angle), s = std::sin(angle);
        const auto turn = [&](double& x, double& y) {
          const double old = x;
          x = c * x - s * y;
          y = s * old + c * y;
        };
        for (int k = 0; k < n; ++k) turn(a.at(k, p), a.at(k, q));
        for (int k = 0; k < n; ++k) turn(a.at(p, k), a.at(q, k));
        for (int k = 0; k < n; ++k) turn(vectors.at(k, p), vectors.at(k, q));
      }
    }
  }
  return vectors;
}

// Of (samples, columns) values, the columns [first, first + size) less their mean.
inline std::vector<double> centred(const std::vector<double>& values, int samples, int columns,
                                   int first, int size, double* mean = nullptr) {
  std::vector<double> rows(size_t(samples) * size);
  for (int c = 0; c < size; ++c) {
    double sum = 0;
    for (int r = 0; r < samples; ++r) sum += values[size_t(r) * columns + first + c];
    if (mean) mean[c] = sum / samples;
    for (int r = 0; r < samples; ++r) {
      rows[size_t(r) * size + c] = values[size_t(r) * columns + first + c] - sum / samples;
    }
  }
  return rows;
}

inline Square moment(const std::vector<double>& a, const std::vector<double>& b, int samples,
                     int size) {
  Square m(size);
  for (int r = 0; r < samples; ++r) {
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) m.at(i, j) += a[r * size + i] * b[r * size + j];
    }
  }
  for (double& value : m.values) value /= samples;
  return m;
}

// The derivative of f(l) = (max(l, 0) + eps)^{-1/2} between two eigenvalues.
inline double divided_difference(double a, double b, double eps) {
  const double x = std::sqrt(std::max(a, 0.0) + eps), y = std::sqrt(std::max(b, 0.0) + eps);
  return -1 / (x * y * (x + y));
}

inline WhitenTruth whiten_in_float64(const std::vector<double>& features,
                                     const std::vector<double>& grad, int samples, int groups,
                                     int size, double eps) {
  const int columns = groups * size;
  WhitenTruth truth{std::vector<double>(features.size()), std::vector<double>(columns),
                    std::vector<double>(size_t(columns) * size),
                    std::vector<double>(features.size()), std::vector<double>(features.size())};
  for (int group = 0; group < groups; ++group) {
    const int first = group * size;
    const auto z = centred(features, samples, columns, first, size, truth.mean.data() + first);
    const auto g = centred(grad, samples, columns, first, size);
    Square eigenvalues = moment(z, z, samples, size);
    const bool finite = std::all_of(eigenvalues.values.begin(), eigenvalues.values.end(),
                                    [](double value) { return std::isfinite(value); });
    const Square vectors = finite ? diagonalise(eigenvalues) : Square(size);
    Square root(size), by_root = moment(z, g, samples, size);
    for (int i = 0; i < size; ++i) {
      root.at(i, i) = finite ? 1 / std::sqrt(std::max(eigenvalues.at(i, i), 0.0) + eps)
                             : std::numeric_limits<double>::quiet_NaN();
    }
    const Square matrix = product(product(vectors, root), vectors, false, true);
    Square symmetric(size);
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) symmetric.at(i, j) = by_root.at(i, j) + by_root.at(j, i);
    }
    Square turned = product(product(vectors, symmetric, true), vectors);
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        turned.at(i, j) *= divided_difference(eigenvalues.at(i, i), eigenvalues.at(j, j), eps);
      }
    }
    const Square by_covariance = product(product(vectors, turned), vectors, false, true);
    std::copy(matrix.values.begin(), matrix.values.end(), truth.matrix.begin() + first * size);
    for (int r = 0; r < samples; ++r) {
      for (int j = 0; j < size; ++j) {
        double whitened = 0, near = 0, far = 0;
        for (int k = 0; k < size; ++k) {
          whitened += z[r * size + k] * matrix.at(k, j);
          near += g[r * size + k] * matrix.at(k, j);
          far += z[r * size + k] * by_covariance.at(k, j);
        }
        const size_t i = size_t(r) * columns + first + j;
        truth.whitened[i] = whitened;
        truth.grad_features[i] = near + far;
        truth.grad_times_matrix[i] = near;
      }
    }
  }
  return truth;
}

}  // namespace medmoco::test
