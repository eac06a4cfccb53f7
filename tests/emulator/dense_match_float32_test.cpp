// dense_match with operands of float32, in three products of TF32.

#include "dense_match_tests.h"

int main() { return medmoco::test::test_dense_match<medmoco::Tf32x3>(); }
