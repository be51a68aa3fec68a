"""Section: choices on the validation concepts, and the costs of all runs."""

import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain

import numpy as np
import torch

from reproduce.folder import read_json
from reproduce.report.cells import NOT_AVAILABLE
from reproduce.report.document import Element, Heading, Paragraph, TextTable
from reproduce.report.report_data import ReportData


def provenance_section(data: ReportData) -> Iterator[Element]:
    """Yield the learning rates that were tried, then the runs with their costs."""
    yield Heading("What was chosen, on the validation concepts alone")
    yield from _rates(data)
    yield Heading("What it took")
    yield from _runs(data)


def _rates(data: ReportData) -> Iterator[Element]:
    path = data.folder["rates.json"]
    sweep = read_json(path) if path.exists() else {"tried": {}}
    tried: dict[str, dict[str, float]] = sweep["tried"]
    if not tried:
        yield Paragraph("Learning rates are those of the configs: this run has no sweep.")
        return
    yield Paragraph(
        f"By the mean reciprocal rank of both directions after {data.plan.sweep.epochs:g} epochs, "
        "one seed; a method's rate holds for all its teachers and ablations."
        + (" The third tower's share, too." if data.plan.mixing is not None else "")
    )
    rates: dict[str, None] = {}
    for scores in tried.values():
        rates |= dict.fromkeys(scores)
    rows = []
    for method, scores in tried.items():
        cells = [f"{100 * scores[rate]:.1f}" if rate in scores else NOT_AVAILABLE for rate in rates]
        rows.append([method, *cells, f"{sweep['chosen'][method]:g}"])
    yield TextTable(["Method", *rates, "Chosen"], rows)


def _runs(data: ReportData) -> Iterator[Element]:
    results = list(chain.from_iterable(data.scores.results.values()))
    seconds = sum(float(result.facts["seconds"]) for result in results)
    expected = len(data.plan.experiments())
    yield Paragraph(
        f"{len(results)} of {expected} runs are finished, {seconds / 60:.0f} core minutes of training, on "
        f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, which decides the last digits, "
        f"{platform.system()}; {datetime.now(UTC):%d %B %Y}."
    )
    if results:
        record, _ = next(iter(results[0].records.values()))
        versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
        yield Paragraph(f"Versions: {versions}.")
    rows = []
    for recipe, seeds in data.scores.results.items():
        name = "-".join(part for part in recipe if part)
        numbers = " ".join(str(result.facts["seed"]) for result in seeds)
        rate = NOT_AVAILABLE
        for change in seeds[0].facts["changes"]:
            if change.startswith("optim.lr="):
                rate = change.partition("=")[2]
        steps = str(seeds[0].facts["steps"])
        seconds_each = np.mean([result.facts["seconds"] for result in seeds])
        images_per_s = np.mean([result.facts["images_per_s"] for result in seeds])
        rows.append([name, numbers, rate, steps, f"{seconds_each:.0f}", f"{images_per_s:.0f}"])
    yield TextTable(["Runs", "Seeds", "Rate", "Steps", "Seconds each", "Images/s"], rows)
