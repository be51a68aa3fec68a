"""What was chosen on the validation concepts, and what all of it took."""

import platform
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
import torch

from reproduce.folder import read_json
from reproduce.report.cells import ABSENT
from reproduce.report.document import Block, Heading, Rows, Text
from reproduce.report.findings import Findings


def blocks(findings: Findings) -> Iterator[Block]:
    yield Heading("What was chosen, on the validation concepts alone")
    yield from _rates(findings)
    yield Heading("What it took")
    yield from _runs(findings)


def _rates(findings: Findings) -> Iterator[Block]:
    path = findings.folder["rates.json"]
    tried = read_json(path)["tried"] if path.exists() else {}
    if not tried:
        yield Text("Learning rates are those of the configs: this run has no sweep.")
        return
    chosen = read_json(path)["chosen"]
    yield Text(
        f"By the mean reciprocal rank of both directions after {findings.plan.sweep.epochs:g} epochs, "
        "one seed; a method's rate holds for all its teachers and ablations. The third tower's share, too."
    )
    rates = list(dict.fromkeys(rate for scores in tried.values() for rate in scores))
    rows = [
        [method, *(f"{100 * s[rate]:.1f}" if rate in s else ABSENT for rate in rates), f"{chosen[method]:g}"]
        for method, s in tried.items()
    ]
    yield Rows(["Method", *rates, "Chosen"], rows)


def _runs(findings: Findings) -> Iterator[Block]:
    results = [result for group in findings.scores.groups.values() for result in group]
    seconds = sum(float(result.facts["seconds"]) for result in results)
    expected = len(findings.plan.experiments())
    yield Text(
        f"{len(results)} of {expected} runs are finished, {seconds / 60:.0f} core minutes of training, on "
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, which decides the last digits, "
        f"{platform.system()}; {datetime.now(UTC):%d %B %Y}."
    )
    records = [record for result in results for record, _ in result.records.values()]
    if records:
        versions = records[0].versions
        yield Text("Versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".")
    yield Rows(
        ["Runs", "Seeds", "Rate", "Steps", "Seconds each", "Images/s"],
        [
            [
                "-".join(part for part in key if part),
                " ".join(str(result.facts["seed"]) for result in group),
                next((c.partition("=")[2] for c in group[0].facts["changes"] if c.startswith("optim.lr=")), ABSENT),
                str(group[0].facts["steps"]),
                f"{np.mean([result.facts['seconds'] for result in group]):.0f}",
                f"{np.mean([result.facts['images_per_s'] for result in group]):.0f}",
            ]
            for key, group in findings.scores.groups.items()
        ],
    )
