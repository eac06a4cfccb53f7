// covariance_loss with products of float32's accuracy.

#include "covariance_loss_tests.h"

int main() { return medmoco::test::test_covariance_loss<medmoco::Tf32x3>(); }
