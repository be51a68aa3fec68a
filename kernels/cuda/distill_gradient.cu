// Backward of the softmax distillation loss: the student's gradient as in softmax_gradient.cu, less each teacher's, all
// recomputed from the finished log-sum-exps and dots in memory. 0 for excluded pairs.
#include "block_weights.h"
#include "direct_gradient.h"
#include "teachers.h"

struct Teacher {
  In<float> dots, scale_and_bias, row_shift, row_factor, column_shift, column_factor;
};

KERNEL(kThreads, kBlocksAtOnce)
distill_gradient(Operands student, Tile tile, Weights of_rows, Weights of_columns, Teachers<Teacher> teachers,
                 DirectGradient to) {
  BlockLogits gradient = block_dots(student, tile);
  to_logits(gradient, tile);
  to_gradients(gradient, of_rows, of_columns);
  UNROLL for (int k = 0; k < TEACHERS; ++k) {
    const Teacher& teacher = teachers.of[k];
    BlockLogits part = teacher_logits(teacher.dots, teacher.scale_and_bias, student, tile);
    to_gradients(part, {teacher.row_shift, teacher.row_factor, tile.rows},
                 {teacher.column_shift, teacher.column_factor, tile.columns});
    BlockLogits::each_row([&](int d, int half) {
      BlockLogits::each_column([&](int a, int side) {
        gradient.value[d][a][half + side] -= part.value[d][a][half + side];
      });
    });
  }
  write_gradient(gradient, to, tile);
}
