"""Bugs planted in the kernels, one at a time, are caught by the emulator.

Two judges look at each. `races` follows who touched what since the last barrier and needs no luck. `values` compares
results with float64 under adversarial schedules; the table says which of them must notice.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulator import EmulationError, Emulator, Mutation, Schedule
from tiles_under_test import Answers, Case, answers, check, emulated

from threetowers.kernels.tiles import TorchTiles

CASE = Case(140, 262, 104, diagonal=1, labels=True)  # several blocks and slices, the last ones ragged
LONELY = Case(5, 1, 8, diagonal=-2)  # row 2 has no pair left
SCHEDULES = {
    "turns-late": Schedule(False, False, False, 1),
    "turns-early": Schedule(False, True, False, 1),
    "greedy-late": Schedule(True, False, False, 1),
    "greedy-early": Schedule(True, True, False, 1),
}
RACES = Schedule(False, False, True, 1)
LOOP = """    wait_copies<kStages - 2>();
    barrier();
    if (s + kStages - 1 < slices) fetch(in, tile, s + kStages - 1);
    commit_copies();
"""


@dataclass(frozen=True)
class Bug:
    """A mutation and what must detect it: part of an error's message, and the schedules that must show it in values."""

    mutation: Mutation
    message: str = ""  # of the races judge; "" where only wrong values can tell
    schedules: tuple[str, ...] = ()
    case: Case = CASE


def in_loop(new: str) -> Mutation:
    return Mutation("block_logits.h", LOOP, new)


WAIT, BARRIER, FETCH, COMMIT = LOOP.splitlines(keepends=True)

BUGS = {
    "no barrier in the ring": Bug(
        in_loop(WAIT + FETCH + COMMIT), "shared memory that", schedules=("turns-early", "turns-late")
    ),
    "barrier before the wait: others' copies may not have landed": Bug(
        in_loop(BARRIER + WAIT + FETCH + COMMIT), "shared memory that a copy", schedules=("turns-late",)
    ),
    "refill before the barrier: others may still read the stage": Bug(
        in_loop(WAIT + FETCH + COMMIT + BARRIER),
        "overwrites shared memory that others read",
        schedules=("greedy-early",),
    ),
    "wait for one group too few": Bug(
        in_loop(LOOP.replace("- 2", "- 1")), "shared memory that a copy", schedules=("greedy-late",)
    ),
    "no commit where nothing is left to fetch": Bug(
        in_loop(WAIT + BARRIER + FETCH.replace(" fetch", " { fetch").rstrip() + " commit_copies(); }\n"),
        "shared memory that",
        schedules=("turns-late",),
    ),
    "ring one stage short": Bug(
        Mutation("block_logits.h", "slice % kStages *", "slice % (kStages - 1) *"),
        "shared memory",
        schedules=("turns-early",),
    ),
    "epilogue reuses the stages too early": Bug(
        Mutation("block_logits.h", "  barrier();\n  return dots;", "  return dots;"),
        "overwrites shared memory",
        schedules=("greedy-late",),
    ),
    "no barrier before the warps' parts are joined": Bug(
        Mutation("stats.cu", "  barrier();\n  write_parts", "  write_parts"), "reads"
    ),
    "no barrier before the gradient is stored": Bug(
        Mutation("block_gradient.h", "  });\n  barrier();\n", "  });\n"), "shared memory"
    ),
    "no barrier before the sigmoid's parts are joined": Bug(
        Mutation("sigmoid.cu", "gradient, tile);\n  barrier();\n", "gradient, tile);\n"), "reads"
    ),
    "barrier in a branch": Bug(
        Mutation(
            "block_parts.h",
            "  if (thread() < kBlock)\n",
            "  if (thread() < kBlock) barrier();\n  if (thread() < kBlock)\n",
        ),
        "deadlock",
    ),
    "shuffle in a branch": Bug(
        Mutation(
            "log_sum.h",
            "  return {max, sum_of_lanes",
            "  if (lane() % 8 == 0) sum_of_lanes(max, 1, 2);\n  return {max, sum_of_lanes",
        ),
        "of its warp wait in",
    ),
    "fragments in the wrong order": Bug(
        Mutation(
            "block_logits.h",
            "lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2",
            "lane() / 8 % 2 * 8 + lane() % 8, k + lane() / 16",
        )
    ),
    "no swizzle: rows share banks": Bug(
        Mutation("block_logits.h", "(c ^ (row / 2 % kSliceChunks))", "c"), "share banks"
    ),
    "no zeros past the depth": Bug(
        Mutation("block_logits.h", "first + r < count && k < depth);", "first + r < count);"), "of a buffer of"
    ),
    "rows past the end are read": Bug(
        Mutation("block_logits.h", "first + r < count && k < depth);", "k < depth);"), "of a buffer of"
    ),
    "misaligned copies": Bug(Mutation("block_logits.h", "* depth + k;", "* depth + k + 1;"), "misaligned"),
    "diagonal not excluded": Bug(Mutation("tile.h", " && j - i != diagonal", "")),
    "columns past the end not excluded": Bug(Mutation("tile.h", "i < rows && j < columns &&", "i < rows &&")),
    "labels ignored": Bug(
        Mutation("block_logits.h", "  if (tile.row_labels.given()) exclude_equal_labels(dots, tile);\n", "")
    ),
    "labels of another row": Bug(
        Mutation(
            "block_logits.h",
            "tile.row_label(first_row() + logits.row(d, half))",
            "tile.row_label(first_row() + logits.row(d, 0))",
        )
    ),
    "half of the lanes summed": Bug(Mutation("stats.cu", "visit); }, 4, 32)", "visit); }, 4, 16)")),
    "empty set is NaN": Bug(Mutation("log_sum.h", "max == -infinity() ? 0.0f : max", "max"), case=LONELY),
    "running statistics forgotten": Bug(Mutation("merge.cu", "{max[i], sum[i]}", "{-infinity(), 0.0f}")),
    "blocks write one part": Bug(
        Mutation("block_parts.h", "static_cast<i64>(block) * count + first", "static_cast<i64>(first)"),
        "another thread wrote",
    ),
    "gradient stored past the stride": Bug(
        Mutation("block_gradient.h", "row >= tile.rows || chunk >= stride", "row >= tile.rows"), "global memory"
    ),
    "an input written": Bug(
        Mutation(
            "stats.cu",
            "  to_logits(logits, tile);\n",
            "  to_logits(logits, tile);\n  Out<u16>{const_cast<u16*>(in.x.at)}.put(0, 0);\n",
        ),
        "writes to an input",
    ),
    "a part never shared": Bug(
        Mutation("stats.cu", "if (lane() / 4 == 0) column", "if (lane() / 4 == 0 && lane() % 4) column"),
    ),
    "more shared memory than asked for": Bug(
        Mutation("sigmoid.cu", "ColumnParts::at(kGradientBytes);", "ColumnParts::at(kGradientBytes + 16384);"),
        "of 49152",
    ),
}


@pytest.fixture(scope="module")
def references() -> dict[Case, Answers]:
    return {case: answers(TorchTiles(torch.float64), case, torch.bfloat16) for case in (CASE, LONELY)}


def judge(bug: Bug, schedule: Schedule, builds: Path, reference: Answers, planted: bool = True) -> None:
    emulator = Emulator(builds, schedule=schedule, mutation=bug.mutation if planted else None)
    check(answers(emulated(emulator, torch.bfloat16), bug.case, torch.bfloat16), reference, bug.case, torch.bfloat16)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name: str, builds: Path, references: dict[Case, Answers]) -> None:
    bug = BUGS[name]
    with pytest.raises(EmulationError if bug.message else AssertionError, match=bug.message or None):
        judge(bug, RACES, builds, references[bug.case])
    for schedule in bug.schedules:
        with pytest.raises(AssertionError):
            judge(bug, SCHEDULES[schedule], builds, references[bug.case])


@pytest.mark.parametrize("case", [CASE, LONELY])
def test_without_a_bug_nothing_is_reported(case: Case, builds: Path, references: dict[Case, Answers]) -> None:
    clean = Bug(Mutation("", "", ""), case=case)
    for schedule in (RACES, *SCHEDULES.values()):
        judge(clean, schedule, builds, references[case], planted=False)
