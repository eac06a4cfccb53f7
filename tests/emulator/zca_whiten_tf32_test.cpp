// zca_whiten with operands of float32 rounded to TF32.

#include "zca_whiten_tests.h"

int main() { return medmoco::test::test_zca_whiten<medmoco::Tf32>(); }
