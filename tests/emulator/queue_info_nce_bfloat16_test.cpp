// queue_info_nce with operands of bfloat16.

#include "queue_info_nce_tests.h"

int main() { return medmoco::test::test_queue_info_nce<medmoco::SixteenBit<medmoco::BFloat16>>(); }
