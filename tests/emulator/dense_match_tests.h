// All tests of dense_match with one kind of operand. Each kind is a program of its own, so that
// they build side by side.

#pragma once

#include "dense_match_edges.h"
#include "dense_match_grid.h"

namespace medmoco::test {

template <typename Kind>
int test_dense_match() {
  test_the_result_is_that_of_float64<Kind>();
  test_many_channels<Kind>();
  test_twenty_schedules_give_the_same_bits<Kind>();
  test_any_split_gives_the_same_bits<Kind>();
  test_any_layout_gives_the_same_bits<Kind>();
  test_maps_that_lie_well_are_not_copied<Kind>();
  test_matches_are_ordered();
  test_ties_go_to_the_lowest_position<Kind>();
  test_a_zero_vector_has_cosine_zero<Kind>();
  test_the_lowest_nan_wins<Kind>();
  test_lengths_do_not_matter<Kind>();
  test_similarity_never_leaves_its_range<Kind>();
  test_no_query_launches_nothing<Kind>();
  test_one_map_may_serve_all_images<Kind>();
  return report();
}

}  // namespace medmoco::test
