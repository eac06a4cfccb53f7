// A few cases of dense_match for tests/planted_bugs/dense_match.py, which builds this against
// a copy of csrc/ with bugs planted in it, and runs it with the number of one of them; 0 is none.
// The first failure ends it.

#include <cstdlib>

#include "dense_match_edges.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

// Neither positions nor channels fill their tiles, and where maps need no copy, memory ends behind
// them. Large: several tiles of queries and of keys for each block. Small: one tile an image.
template <typename Kind>
void check_large(int batch, int channels, int keys, Lies query, Lies key) {
  check<Kind>({.batch = batch,
               .channels = channels,
               .queries = 136,
               .keys = keys,
               .query = query,
               .key = key});
}
template <typename Kind>
void check_small(int channels, int keys, Lies lies) {
  check<Kind>(
      {.batch = 5, .channels = channels, .queries = 48, .keys = keys, .query = lies, .key = lies});
}

}  // namespace

int main(int, char** arguments) {
  using Sixteen = SixteenBit<BFloat16>;
  planted_bug = std::atoi(arguments[1]);
  for (const auto test : {
           +[] { check_small<Sixteen>(300, 49, Lies::kOddStart); },
           +[] { check_small<Sixteen>(330, 40, Lies::kChannelsFirst); },
           +[] { check_large<Sixteen>(2, 136, 264, Lies::kChannelsLast, Lies::kChannelsLast); },
           +[] { check_large<Sixteen>(1, 300, 261, Lies::kChannelsFirst, Lies::kEveryOther); },
           +[] { check_large<Tf32x3>(1, 50, 264, Lies::kChannelsFirst, Lies::kChannelsFirst); },
           +[] { check_small<Tf32x3>(70, 49, Lies::kRowsApart); },
           test_matches_are_ordered,
           test_ties_go_to_the_lowest_position<Sixteen>,
           test_a_zero_vector_has_cosine_zero<Sixteen>,
           test_the_lowest_nan_wins<Sixteen>,
           test_lengths_do_not_matter<Sixteen>,
           test_similarity_never_leaves_its_range<Sixteen>,
       }) {
    test();
    if (failures > 0) break;
  }
  return report();
}
