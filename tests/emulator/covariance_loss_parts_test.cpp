// The parts of covariance_loss besides its products.

#include "covariance_loss_parts.h"

int main() {
  using namespace medmoco::test;
  test_ranks_are_those_of_a_sort();
  test_direct_rows_are_summed_in_float64();
  test_memory_is_what_the_matrix_and_its_parts_take();
  return report();
}
