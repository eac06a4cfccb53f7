// dense_match with operands of bfloat16.

#include "dense_match_tests.h"

int main() { return medmoco::test::test_dense_match<medmoco::SixteenBit<medmoco::BFloat16>>(); }
