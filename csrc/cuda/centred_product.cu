// The products of centred operands, compiled once for all operators.

#include "centred_apply.cuh"
#include "centred_moment.cuh"

namespace medmoco {

#define MEDMOCO_PRODUCTS(kind, layout)                                                             \
  template void centred_moment<kind, layout>(const char*, const MomentPlan&, const Term&, Stream); \
  template void centred_apply<kind, layout>(const char*, const ApplyArguments&, int, Stream);

MEDMOCO_PRODUCTS(Tf32, kRowsAreLines)
MEDMOCO_PRODUCTS(Tf32, kRowsAreDepth)
MEDMOCO_PRODUCTS(Tf32x3, kRowsAreLines)
MEDMOCO_PRODUCTS(Tf32x3, kRowsAreDepth)

}  // namespace medmoco
