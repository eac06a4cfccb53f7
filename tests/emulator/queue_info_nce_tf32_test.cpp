// queue_info_nce with operands of float32, rounded to TF32.

#include "queue_info_nce_tests.h"

int main() {
  medmoco::test::test_tf32_operands_are_rounded_to_nearest();
  return medmoco::test::test_queue_info_nce<medmoco::Tf32>();
}
