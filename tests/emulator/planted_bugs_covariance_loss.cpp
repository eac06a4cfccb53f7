// A few cases of covariance_loss and of column moments for
// tests/planted_bugs/covariance_loss.py, which builds this against a copy of csrc/ with bugs
// planted in it, and runs it with the number of one of them; 0 is none. The first failure ends it.

#include <cstdlib>

#include "column_moments_check.h"
#include "covariance_loss_parts.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

// Several slices of the rows, of which the last column's block is not full.
void check_moments_of(int rows, int columns, Layout layout) {
  auto values = Values::normal(rows, columns, 3);
  for (int j = 0; j < columns; ++j) values.change_column(j, 1, 5);
  values.change_column(0, 1, 1e6);
  check_moments({.rows = rows, .columns = columns, .multiprocessors = 3, .layout = layout}, values);
}

// Some columns hold most of the variance; tiles are not full, and have several parts.
void check_loss(int samples, int dims) {
  const CovarianceCase c{.samples = samples, .dims = dims, .multiprocessors = 3, .grad_loss = 0.7f};
  auto values = c.normal();
  for (int j = 0; j < dims; j += 9) values.change_column(j, 10, 3);
  check<Tf32x3>(c, values);
}

}  // namespace

int main(int, char** arguments) {
  planted_bug = std::atoi(arguments[1]);
  for (const auto test : {
           +[] { check_moments_of(1100, 40, Layout::kTransposed); },
           +[] { check_moments_of(1600, 3, Layout::kRows); },
           +[] { check_moments_of(19, 33, Layout::kRows); },
           +[] { check_loss(150, 70); },
           +[] { check_loss(70, 150); },
           +[] { check_loss(9, 11); },
           test_ranks_are_those_of_a_sort,
           test_direct_rows_are_summed_in_float64,
       }) {
    test();
    if (failures > 0) break;
  }
  return report();
}
