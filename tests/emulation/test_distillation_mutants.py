"""Bugs planted in the kernels of distillation, one at a time, are caught by the emulator, as in test_mutants.py."""

import functools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distillation_under_test import Answers, DistillationCase, answers, check
from emulator import EmulationError, Emulator, Mutation, Schedule
from tiles_under_test import Case, emulated

from threetowers.kernels.tiles.torch_tiles import TorchTiles

CASE = DistillationCase(Case(70, 131, 24, diagonal=1, labels=True), (40, 9))  # several blocks, the last ones ragged
RACES = Schedule(False, False, True, 1)
GREEDY = Schedule(True, False, False, 1)


@dataclass(frozen=True)
class Bug:
    """A mutation and what must detect it: part of an error's message, or "" where only wrong values can tell."""

    file: str
    old: str
    new: str
    message: str = ""
    element: torch.dtype = torch.bfloat16
    greedy: bool = False  # whether values must show it, too, where a warp runs as far as it gets

    @property
    def mutation(self) -> Mutation:
        return Mutation(self.file, self.old, self.new)


BUGS = {
    "no barrier between the parts of two models": Bug(
        "distill_stats.cu",
        "    barrier();  // the parts before have left shared memory\n",
        "",
        "overwrites shared memory that others read",
        greedy=True,
    ),
    "more shared memory than asked for": Bug(
        "block_parts.h",
        "::at(rows.kBytes);",
        "::at(rows.kBytes + 4096);",
        "touches shared memory at byte",
    ),
    "the first teacher's parts only": Bug("distill_stats.cu", "teachers.of[k]", "teachers.of[0]"),
    "expectation of the teacher's own logits": Bug(
        "distill_stats.cu", "write_expectations(logits, dots,", "write_expectations(logits, logits,"
    ),
    "expectation over half of a column's lanes": Bug("distill_stats.cu", "4, 32);", "4, 16);"),
    "cross sums of two maxima added": Bug("expectation.h", "cross * own + other", "cross + other"),
    "cross of one lane": Bug("expectation.h", "sum_of_lanes(cross, first, end)", "cross"),
    "running cross forgotten": Bug("merge_expectations.cu", "{max[i], sum[i], cross[i]}", "{max[i], sum[i], 0.0f}"),
    "parts of one block merged": Bug("merge_expectations.cu", "p < count", "p < 1"),
    "a teacher with its student's scale": Bug("teachers.h", "  tile.scale_and_bias = scale_and_bias;\n", ""),
    "a teacher of the samples' own pairs": Bug(
        "teachers.h", "  to_logits(logits, tile);\n", "  tile.diagonal = tile.columns;\n  to_logits(logits, tile);\n"
    ),
    "wide reads of a teacher's rows that are not aligned": Bug(
        "teachers.h", "{dots, student.aligned}", "{dots, 1}", "global memory"
    ),
    "teachers added to the gradient": Bug("distill_gradient.cu", "-= part", "+= part"),
    "a teacher with its student's columns": Bug(
        "distill_gradient.cu", "{teacher.column_shift, teacher.column_factor, tile.columns}", "of_columns"
    ),
    "a teacher's rows past the end": Bug(
        "distill_gradient.cu", "teacher.row_factor, tile.rows}", "teacher.row_factor, 128}", "of a buffer of"
    ),
    "gradient past the stride": Bug(
        "direct_gradient.h", "i >= tile.rows || j >= to.stride", "i >= tile.rows", "global memory"
    ),
    "gradient past the rows": Bug(
        "direct_gradient.h", "i >= tile.rows || j >= to.stride", "j >= to.stride", "of a buffer of"
    ),
    "neighbours of a gradient exchanged": Bug(
        "direct_gradient.h", "left[0], left[1], right", "left[1], left[0], right"
    ),
    "float32 neighbours exchanged": Bug("direct_gradient.h", "{{a, b, c, d}}", "{{a, c, b, d}}", element=torch.float32),
    "fp16 gradients without their gain": Bug(
        "direct_gradient.h", "pack(kGain * a, kGain * b)", "pack(a, b)", element=torch.float16
    ),
    "teachers without their weights": Bug("distill_sigmoid.cu", "+= teacher.weight * ", "+= "),
    "the last teacher's target only": Bug("distill_sigmoid.cu", "+= teacher.weight", "= teacher.weight"),
    "rows without their weights": Bug("distill_sigmoid.cu", "q = weight * one", "q = one"),
    "loss of half of the lanes": Bug("distill_sigmoid.cu", "(part.sum.loss, 1, 4)", "(part.sum.loss, 1, 2)"),
    "column maxima of half of the lanes": Bug("distill_sigmoid.cu", "(max, 4, 32)", "(max, 4, 16)"),
    "an excluded logit times its target": Bug("tile.h", "fminf(-logit, kLargest)", "(-logit)"),
    "probability without its target": Bug(
        "tile.h", "probability_of(logit, tail) - target", "probability_of(logit, tail)"
    ),
}


@functools.cache
def reference_of(element: torch.dtype) -> Answers:
    return answers(TorchTiles(torch.float64), CASE, element)


def judge(element: torch.dtype, schedule: Schedule, builds: Path, mutation: Mutation | None) -> None:
    emulator = Emulator(builds, schedule=schedule, mutation=mutation)
    check(answers(emulated(emulator, element), CASE, element), reference_of(element), CASE, element)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, builds: Path) -> None:
    bug = BUGS[name]
    with pytest.raises(EmulationError if bug.message else AssertionError, match=bug.message or None):
        judge(bug.element, RACES, builds, bug.mutation)
    if bug.greedy:
        with pytest.raises(AssertionError):
            judge(bug.element, GREEDY, builds, bug.mutation)


@pytest.mark.parametrize("element", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_bug_nothing_is_reported(element: torch.dtype, builds: Path) -> None:
    for schedule in (RACES, GREEDY):
        judge(element, schedule, builds, None)
