// A few cases of the product of centred operands for tests/planted_bugs/centred_product.py,
// which builds this against a copy of csrc/ with bugs planted in it, and runs it with the number of
// one of them; 0 is none. The first failure ends it.

#include <cstdlib>

#include "centred_product_tests.h"

using namespace medmoco;
using namespace medmoco::test;

int main(int, char** arguments) {
  planted_bug = std::atoi(arguments[1]);
  for (const auto test : {
           test_tiles_are_found_by_their_number,
           // Several tiles and chunks for each block, and a part of some of them.
           +[] {
             check<Tf32x3>(
                 {.left = {1, 270, 136, Storage::kFloat32, Stored::kTogether, true}, .right = {}});
           },
           +[] {
             check<Tf32x3>({.left = {2, 50, 72, Storage::kBFloat16, Stored::kOddStart, true},
                            .right = {2, 50, 75, Storage::kFloat16, Stored::kRowsApart},
                            .symmetric = false});
           },
           +[] {
             check<Tf32x3>({.left = {1, 70, 99, Storage::kFloat16, Stored::kTransposed, true, true},
                            .right = {},
                            .rows_are_lines = true});
           },
           +[] {
             check<Tf32x3>({.left = {1, 70, 100, Storage::kFloat32, Stored::kEveryOther, true},
                            .right = {},
                            .rows_are_lines = true});
           },
           +[] {
             check<Tf32x3>({.rows = 67, .columns = 70, .depth = 40, .batch = 2, .two_terms = true});
           },
           +[] {
             check<Tf32x3>({.rows = 70,
                            .columns = 66,
                            .depth = 40,
                            .right_rows_are_lines = false,
                            .subtract = true,
                            .storage = Storage::kBFloat16});
           },
       }) {
    test();
    if (failures > 0) break;
  }
  return report();
}
