// A few cases of zca_whiten for tests/planted_bugs/zca_whiten.py, which builds this against a
// copy of csrc/ with bugs planted in it, and runs it with the number of one of them; 0 is none. The
// first failure ends it.

#include <cstdlib>

#include "eigh_case.h"
#include "zca_whiten_tests.h"

using namespace medmoco;
using namespace medmoco::test;

namespace {

using Kind = Tf32x3;

void check_several_groups() {
  check<Kind>({.samples = 40,
               .groups = 3,
               .size = 5,
               .features = Rows::kEveryOther,
               .grad = Rows::kTransposed});
}

void check_matrices() {
  decompose_and_check("random", 7, covariance(7, 20));
  decompose_and_check("with a quiet last round", 8, early_pairs());
  decompose_and_check("tiny", 6, covariance(6, 20, 1e-30));
  decompose_and_check("near the largest float", 2, {2e38f, 1e38f, 1e38f, 2e38f});
}

}  // namespace

int main(int, char** arguments) {
  planted_bug = std::atoi(arguments[1]);
  for (const auto test : {
           check_several_groups,
           check_matrices,
           test_scale_does_not_matter<Kind>,
           test_a_mean_far_above_the_spread_keeps_the_digits<Kind>,
           test_noise_below_zero_is_no_root_of_a_negative<Kind>,
           test_what_is_not_finite_reaches_its_group_alone<Kind>,
           +[] { check<Kind>({.samples = 9, .groups = 1, .size = 67}); },
       }) {
    test();
    if (failures > 0) break;
  }
  return report();
}
