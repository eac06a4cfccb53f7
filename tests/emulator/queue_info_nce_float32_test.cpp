// queue_info_nce with operands of float32, as exact as float32.

#include "queue_info_nce_tests.h"

int main() { return medmoco::test::test_queue_info_nce<medmoco::Tf32x3>(); }
