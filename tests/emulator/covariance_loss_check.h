// covariance_loss on the emulator against its formula in float64.

#pragma once

#include "covariance_loss_case.h"
#include "expect.h"

namespace medmoco::test {

// What the loss may err by, over its value, and the gradient, over the largest in it.
template <typename Kind>
constexpr double kAllowed = 3e-6;
template <>
constexpr double kAllowed<Tf32> = 3e-3;

inline double rounding_of(Storage storage) {
  return storage == Storage::kFloat32 ? 0 : storage == Storage::kBFloat16 ? 0x1p-8 : 0x1p-11;
}

struct CovarianceTruth {
  Values centred, covariance, gradient;
  double loss = 0;

  CovarianceTruth(const Values& features, double grad_loss)
      : centred(features),
        covariance(features.columns, features.columns),
        gradient(features.rows, features.columns) {
    const int samples = features.rows, dims = features.columns;
    for (int j = 0; j < dims; ++j) {
      double mean = 0;
      for (int i = 0; i < samples; ++i) mean += features.at(i, j);
      for (int i = 0; i < samples; ++i) centred.at(i, j) -= mean / samples;
    }
    for (int i = 0; i < samples; ++i) {
      for (int j = 0; j < dims; ++j) {
        for (int k = 0; k < dims; ++k) {
          covariance.at(j, k) += centred.at(i, j) * centred.at(i, k) / (samples - 1);
        }
      }
    }
    for (int j = 0; j < dims; ++j) {
      for (int k = 0; k < dims; ++k) {
        if (j != k) loss += covariance.at(j, k) * covariance.at(j, k) / dims;
      }
    }
    const double scale = 4 * grad_loss / (double(dims) * (samples - 1));
    for (int i = 0; i < samples; ++i) {
      for (int j = 0; j < dims; ++j) {
        for (int k = 0; k < dims; ++k) {
          if (j != k) gradient.at(i, k) += scale * centred.at(i, j) * covariance.at(j, k);
        }
      }
    }
  }
};

inline double largest(const Values& values) {
  double largest = 0;
  for (const double value : values.data) largest = std::max(largest, std::abs(value));
  return largest;
}

// Largest difference, also where one is NaN and the other is not.
inline double difference(const Values& a, const Values& b) {
  double largest = 0;
  for (size_t i = 0; i < a.data.size(); ++i) {
    const double error = std::abs(a.data[i] - b.data[i]);
    if (!(error <= largest)) largest = std::isnan(error) ? HUGE_VAL : error;
  }
  return largest;
}

template <typename Kind>
CovarianceResult check(const CovarianceCase& c, const Values& values,
                       double allowed = kAllowed<Kind>) {
  const StoredMatrix stored(values, c.storage, c.layout);
  const CovarianceTruth truth(stored.values, c.grad_loss);
  const auto found = run<Kind>(c, stored);
  const double error = difference(found.gradient, truth.gradient);
  const double scale = largest(truth.gradient);
  std::ostringstream text;
  text << truth.loss << ", got " << found.loss << "; gradient up to " << scale << ", errs by "
       << error << ": " << c.text();
  expect(std::abs(found.loss - truth.loss) <= allowed * truth.loss, "loss " + text.str());
  expect(error <= (allowed + rounding_of(c.storage)) * scale, "the gradient; loss " + text.str());
  return found;
}

template <typename Kind>
CovarianceResult check(const CovarianceCase& c) {
  return check<Kind>(c, c.normal());
}

}  // namespace medmoco::test
