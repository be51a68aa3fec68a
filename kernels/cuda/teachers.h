// A student's teachers (-DTEACHERS=K of them). Their dots lie in memory, as the student's do; each has its own logit map, and
// excludes the same pairs. Their number is known to the compiler, so that no loop over them is left standing.
#pragma once
#include "library_dots.h"

#ifndef TEACHERS
#define TEACHERS 1
#endif

template <class Teacher>
struct Teachers {
  Teacher of[TEACHERS];
};

// A teacher's logits in base 2. student: the student's dots, whose alignment is that of all.
DEVICE BlockLogits teacher_logits(In<float> dots, In<float> scale_and_bias, const Operands& student, Tile tile) {
  tile.scale_and_bias = scale_and_bias;
  BlockLogits logits = block_dots({dots, student.aligned}, tile);
  to_logits(logits, tile);
  return logits;
}
