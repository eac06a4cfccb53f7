// All tests of queue_info_nce with one kind of operand. Each kind is a program of its own, so that
// they build side by side.

#pragma once

#include "queue_info_nce_edges.h"
#include "queue_info_nce_grid.h"

namespace medmoco::test {

template <typename Kind>
int test_queue_info_nce() {
  test_the_result_is_that_of_float64<Kind>();
  test_a_long_queue_errs_no_more_than_was_measured<Kind>();
  test_twenty_schedules_give_the_same_bits<Kind>();
  test_any_layout_gives_the_same_bits<Kind>();
  test_edges<Kind>();
  print_closest();
  return report();
}

}  // namespace medmoco::test
