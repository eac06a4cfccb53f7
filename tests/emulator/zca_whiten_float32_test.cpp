// zca_whiten with operands of float32, in three products of TF32.

#include "zca_whiten_tests.h"

int main() { return medmoco::test::test_zca_whiten<medmoco::Tf32x3>(); }
