// A few cases of queue_info_nce for tests/planted_bugs/queue_info_nce.py, which builds this
// against a copy of csrc/ with bugs planted in it, and runs it with the number of one of them; 0 is
// none. The first failure ends it.

#include <cstdlib>

#include "queue_info_nce_combine.h"
#include "queue_info_nce_edges.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

// Two or three tiles of queries and several of the queue, in 6 blocks. Neither rows nor columns
// fill their tiles, and where they need no copy, memory ends behind them.
template <typename Kind>
void check_shape(int embed_dim, bool ids, Layout layout = Layout::kDense) {
  check<Kind>({.batch = 130,
               .queue_size = 270,
               .embed_dim = embed_dim,
               .temperature = 0.07f,
               .ids = ids,
               .multiprocessors = 3,
               .layout = layout});
}

}  // namespace

int main(int, char** arguments) {
  using Sixteen = SixteenBit<BFloat16>;
  planted_bug = std::atoi(arguments[1]);
  for (const auto test : {
           +[] { check_shape<Sixteen>(48, false); },
           +[] { check_shape<Sixteen>(61, true, Layout::kApart); },
           +[] { check_shape<Tf32>(35, false, Layout::kMisaligned); },
           +[] { check_shape<Tf32x3>(64, false); },
           test_tf32_operands_are_rounded_to_nearest,
           test_ids_match_in_all_64_bits_and_negative_ones_match_nothing<Sixteen>,
           test_a_single_entry_with_the_id_of_a_query_is_left_out<Sixteen>,
           test_a_nan_key_gives_the_rank_of_what_counts<Sixteen>,
           test_duplicates_of_the_key_each_count<Sixteen>,
           test_a_peak_that_moves_from_tile_to_tile<Sixteen>,
           test_parts_are_combined_by_any_number_of_warps,
       }) {
    test();
    if (failures > 0) break;
  }
  return report();
}
