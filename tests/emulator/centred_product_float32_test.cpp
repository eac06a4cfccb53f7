// The product of centred operands with the accuracy of float32.

#include "centred_product_tests.h"

int main() { return medmoco::test::test_centred_product<medmoco::Tf32x3>(); }
