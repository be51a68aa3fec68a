"""Bugs planted in the kernels, one at a time, are caught by the emulator.

Two judges look at each. `races` follows who touched what since the last barrier and needs no luck. `values` compares
results with float64 under adversarial schedules; the table says which of them must notice.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulator import EmulationError, Emulator, Mutation, Schedule
from tiles_under_test import Answers, Case, answers, check, emulated

from threetowers.kernels.cuda.block_shape import LIBRARY, NARROW, TILES, WIDE
from threetowers.kernels.tiles.torch_tiles import TorchTiles

CASE = Case(140, 262, 104, diagonal=1, labels=True)  # several blocks and slices, the last ones ragged
LIMITED = Case(70, 131, 40, diagonal=1, limits=True)
LONELY = Case(5, 1, 8, diagonal=-2)  # row 2 has no pair left
SCHEDULES = {
    "turns-late": Schedule(False, False, False, 1),
    "turns-early": Schedule(False, True, False, 1),
    "greedy-late": Schedule(True, False, False, 1),
    "greedy-early": Schedule(True, True, False, 1),
}
RACES = Schedule(False, False, True, 1)
ENTER = "  wait_copies<kStages - 2>();\n  barrier();\n"
REFILL = "  if (s + kStages - 1 < slices) fetch(in, tile, s + kStages - 1);\n  commit_copies();\n"

AHEAD_LOAD = "    if (s + 1 < slices) load(first, stage_of(s + 1), 0);\n"
AHEAD_REFILL = "    refill(in, tile, s + 1, slices);\n"
AHEAD_ENTER = "    enter_slice();  // after the last slice: before the stages are used for something else\n"
AHEAD = AHEAD_ENTER + AHEAD_LOAD + AHEAD_REFILL


@dataclass(frozen=True)
class Bug:
    """A mutation and what must detect it: part of an error's message, and the schedules that must show it in values."""

    mutation: Mutation
    message: str = ""  # of the races judge; "" where only wrong values can tell
    schedules: tuple[str, ...] = ()
    case: Case = CASE
    tiles: tuple[str, ...] = (NARROW, WIDE)


def in_ring(old: str, new: str) -> Mutation:
    return Mutation("block_product.h", old, new)


BUGS = {
    "no barrier in the ring": Bug(
        in_ring(ENTER, ENTER.replace("  barrier();\n", "")),
        "shared memory that",
        schedules=("turns-early", "turns-late"),
    ),
    "barrier before the wait: others' copies may not have landed": Bug(
        in_ring(ENTER, "  barrier();\n  wait_copies<kStages - 2>();\n"),
        "shared memory that a copy",
        schedules=("turns-late",),
    ),
    "refill before the barrier: others may still read the stage": Bug(
        in_ring(
            "    enter_slice();\n    refill(in, tile, s, slices);\n",
            "    wait_copies<kStages - 2>();\n    refill(in, tile, s, slices);\n    barrier();\n",
        ),
        "overwrites shared memory that others read",
        schedules=("greedy-early",),
        tiles=(NARROW,),
    ),
    "refill before the barrier, fragments ahead": Bug(
        in_ring(AHEAD, "    wait_copies<kStages - 2>();\n" + AHEAD_REFILL + "    barrier();\n" + AHEAD_LOAD),
        "overwrites shared memory that others read",
        schedules=("greedy-early",),
        tiles=(WIDE,),
    ),
    "fragments loaded before their slice is entered": Bug(
        in_ring(AHEAD, AHEAD_LOAD + "    enter_slice();\n" + AHEAD_REFILL),
        "reads shared memory that a copy",
        schedules=("turns-late",),
        tiles=(WIDE,),
    ),
    "wait for one group too few": Bug(
        in_ring(ENTER, ENTER.replace("- 2", "- 1")), "shared memory that a copy", schedules=("greedy-late",)
    ),
    "no commit where nothing is left to fetch": Bug(
        in_ring(REFILL, REFILL.replace(" fetch", " { fetch").replace(";\n  commit_copies();", "; commit_copies(); }")),
        "shared memory that",
        schedules=("turns-late",),
    ),
    "ring one stage short": Bug(
        in_ring("slice % kStages *", "slice % (kStages - 1) *"), "shared memory", schedules=("turns-early",)
    ),
    "epilogue reuses the stages too early": Bug(
        in_ring("  barrier();  // before the stages", "  // before the stages"),
        "overwrites shared memory",
        schedules=("greedy-late",),
        tiles=(NARROW,),
    ),
    "epilogue reuses the stages too early, fragments ahead": Bug(
        in_ring(AHEAD_ENTER, "    if (s + 1 < slices) enter_slice();\n"),
        "overwrites shared memory",
        schedules=("greedy-late",),
        tiles=(WIDE,),
    ),
    "no barrier before the warps' parts are joined": Bug(
        Mutation("block_parts.h", "  barrier();\n  write_parts", "  write_parts"), "reads"
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
            "  for (int position",
            "  if (thread() < 128) barrier();\n  for (int position",
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
        in_ring(
            "lane() / 16 * 8 + lane() % 8, k + lane() / 8 % 2",
            "lane() / 8 % 2 * 8 + lane() % 8, k + lane() / 16",
        )
    ),
    "no swizzle: rows share banks": Bug(in_ring("(c ^ (row / 2 % kSliceChunks))", "c"), "share banks"),
    "no zeros past the depth": Bug(
        in_ring("first + r < count && k < depth);", "first + r < count);"), "of a buffer of"
    ),
    "rows past the end are read": Bug(in_ring("first + r < count && k < depth);", "k < depth);"), "of a buffer of"),
    "misaligned copies": Bug(in_ring("* depth + k;", "* depth + k + 1;"), "misaligned"),
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
    "limits ignored": Bug(
        Mutation("block_logits.h", "  exclude_above_limits(dots, tile);\n", ""),
        case=LIMITED,
    ),
    "limits of columns past the end are read": Bug(
        Mutation("tile.h", "return j < columns ? column_limits[j] : infinity();", "return column_limits[j];"),
        "of a buffer of",
        case=LIMITED,
    ),
    "half of the lanes summed": Bug(Mutation("block_log_sums.h", "visit); }, 4, 32)", "visit); }, 4, 16)")),
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
        Mutation("block_parts.h", "if (lane() / 4 == 0) column", "if (lane() / 4 == 0 && lane() % 4) column"),
    ),
    "more shared memory than asked for": Bug(
        Mutation("sigmoid.cu", "::at(kGradientBytes);", "::at(kGradientBytes + 32768);"),
        "touches shared memory at byte",
    ),
}


LIBRARY_BUGS = {
    "rows past the end are read from memory": Bug(
        Mutation("library_dots.h", "  if (i >= tile.rows) return;\n", ""), "of a buffer of"
    ),
    "columns past the end are read from memory": Bug(
        Mutation("library_dots.h", "if (first + 2 * a + n < tile.columns) four", "four"), "of a buffer of"
    ),
    "wide reads of rows that are not aligned": Bug(
        Mutation("library_dots.h", "if (in.aligned)", "if (in.aligned || tile.columns % 2 == 0)")
    ),
    "dots in the wrong columns": Bug(
        Mutation("library_dots.h", "[a + n / 2][half + n % 2]", "[a + n % 2][half + n / 2]")
    ),
}
BUGS |= {name: replace(bug, tiles=(LIBRARY,)) for name, bug in LIBRARY_BUGS.items()}


def planted() -> Iterator[object]:
    """Yield every bug with the tiles in which it is planted; outside the ring, wide ones in the deeper sweeps only."""
    for name, bug in BUGS.items():
        for tiles in bug.tiles:
            slow = tiles == WIDE and NARROW in bug.tiles and bug.mutation.file != "block_product.h"
            yield pytest.param(name, tiles, id=f"{name}-{tiles}", marks=[pytest.mark.slow] if slow else [])


def for_tiles(case: Case, tiles: str) -> Case:
    """Return the case with more slices than the ring of these tiles has stages."""
    return replace(case, width=168) if case is CASE and tiles == WIDE else case


@functools.cache
def reference_of(case: Case) -> Answers:
    return answers(TorchTiles(torch.float64), case, torch.bfloat16)


def judge(bug: Bug, tiles: str, schedule: Schedule, builds: Path, plant: bool = True) -> None:
    emulator = Emulator(builds, schedule=schedule, mutation=bug.mutation if plant else None)
    case = for_tiles(bug.case, tiles)
    got = answers(emulated(emulator, torch.bfloat16, tiles), case, torch.bfloat16)
    check(got, reference_of(case), case, torch.bfloat16)


@pytest.mark.parametrize(("name", "tiles"), [*planted()])
def test_planted_bug_is_caught(name: str, tiles: str, builds: Path) -> None:
    bug = BUGS[name]
    with pytest.raises(EmulationError if bug.message else AssertionError, match=bug.message or None):
        judge(bug, tiles, RACES, builds)
    for schedule in bug.schedules:
        with pytest.raises(AssertionError):
            judge(bug, tiles, SCHEDULES[schedule], builds)


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("case", [CASE, LIMITED, LONELY])
def test_without_a_bug_nothing_is_reported(case: Case, tiles: str, builds: Path) -> None:
    clean = Bug(Mutation("", "", ""), case=case)
    for schedule in (RACES, *SCHEDULES.values()):
        judge(clean, tiles, schedule, builds, plant=False)
