// queue_info_nce with operands of float16.

#include "queue_info_nce_tests.h"

int main() { return medmoco::test::test_queue_info_nce<medmoco::SixteenBit<medmoco::Half>>(); }
