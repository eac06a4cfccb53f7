// The product of centred operands rounded to TF32.

#include "centred_product_tests.h"

int main() { return medmoco::test::test_centred_product<medmoco::Tf32>(); }
