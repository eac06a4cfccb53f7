// The order of threads once more, with the switch of stacks that other processors have.

#define MEDMOCO_EMULATOR_UCONTEXT
#include "emulator_schedule_test.cpp"
