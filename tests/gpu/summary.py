"""The summary: how every step ended, each figure beside its prediction, what was not done."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.predictions import Prediction
from tests.gpu.runner import Outcome


def summarize(outcomes: Sequence[Outcome], results: Path, predictions: Mapping[str, Prediction]) -> str:
    """Return the summary as text.

    Args:
        outcomes: How the steps ended.
        results: JSON lines that the steps have written.
        predictions: What was expected, by the figure's name.
    """
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    parts = ["Steps", *(_outcome_line(outcome) for outcome in outcomes)]
    parts += ["", f"{'Figure':52} {'predicted':>15} {'measured':>10}"]
    parts += [_figure_line(row, predictions.get(row["figure"])) for row in rows if "figure" in row]
    measured = {row["figure"] for row in rows if "figure" in row}
    missing = [name for name in predictions if name not in measured]
    if missing:
        parts += ["", "Predicted, not measured", *(f"  {name}" for name in missing)]
    skipped = [row for row in rows if "skipped" in row]
    if skipped:
        parts += ["", "Not done", *(f"  {row['step']}: {row['skipped']}: {row['why']}" for row in skipped)]
    for outcome in outcomes:
        if outcome.state in ("FAILED", "OUT OF TIME"):
            parts += ["", f"The end of {outcome.step.module}, {outcome.state}", outcome.tail]
    return "\n".join(parts) + "\n"


def _outcome_line(outcome: Outcome) -> str:
    what = "checks" if outcome.step.checks else "measures"
    return f"  {outcome.step.module:18} {outcome.state:11} {outcome.seconds:6.1f} s  {what}: {outcome.step.shows}"


def _figure_line(row: Mapping[str, Any], prediction: Prediction | None) -> str:
    value, unit = row["value"], row["unit"]
    expected = "" if prediction is None else prediction.text()
    verdict = "" if prediction is None else prediction.verdict(value)
    return f"  {row['figure']:50} {expected:>15} {value:>10.4g} {unit:10} {verdict}".rstrip()
