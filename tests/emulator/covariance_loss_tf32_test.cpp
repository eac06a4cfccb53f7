// covariance_loss with products rounded to TF32.

#include "covariance_loss_tests.h"

int main() { return medmoco::test::test_covariance_loss<medmoco::Tf32>(); }
