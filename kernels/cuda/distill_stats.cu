// Forward of the softmax distillation loss: the student's log-sum-exps as in stats.cu, and every teacher's, with the student's
// expected dot under the teacher's softmax. The dots of all of them are in memory.
#include "block_log_sums.h"
#include "expectation.h"
#include "teachers.h"

struct Teacher {
  In<float> dots, scale_and_bias;
  Out<Expectation> row_parts, column_parts;  // (blocks across, rows), (blocks down, columns)
};

DEVICE void write_expectations(const BlockLogits& logits, const BlockLogits& dots, const Teacher& to, const Tile& tile) {
  const auto of_row = [&](int d, int half) {
    return expectation_over(
        [&](auto visit) {
          BlockLogits::each_column([&](int a, int side) {
            visit(logits.value[d][a][half + side], dots.value[d][a][half + side]);
          });
        },
        1, 4);
  };
  const auto of_column = [&](int a, int side) {
    return expectation_over(
        [&](auto visit) {
          BlockLogits::each_row([&](int d, int half) {
            visit(logits.value[d][a][half + side], dots.value[d][a][half + side]);
          });
        },
        4, 32);
  };
  join_parts(of_row, to.row_parts, of_column, to.column_parts, tile);
}

// row_parts (blocks across, rows) and column_parts (blocks down, columns) are the student's.
KERNEL(kThreads, kBlocksAtOnce)
distill_stats(Operands student, Tile tile, Out<LogSum> row_parts, Out<LogSum> column_parts, Teachers<Teacher> teachers) {
  const BlockLogits dots = block_dots(student, tile);
  BlockLogits logits = dots;
  to_logits(logits, tile);
  write_log_sums(logits, row_parts, column_parts, tile);
  UNROLL for (int k = 0; k < TEACHERS; ++k) {
    const Teacher& teacher = teachers.of[k];
    logits = teacher_logits(teacher.dots, teacher.scale_and_bias, student, tile);
    barrier();  // the parts before have left shared memory
    write_expectations(logits, dots, teacher, tile);
  }
}
