"""A report from the records of earlier evaluations alone."""

from collections.abc import Sequence
from pathlib import Path

from threetowers.eval.report.page import ReportPaths, render
from threetowers.eval.report.results import load_results


def compare(
    folders: Sequence[Path], output_dir: Path | None = None, models: Sequence[str] = (), title: str = "Evaluation"
) -> ReportPaths:
    """Write a report on the models of some evaluation folders, and return its paths.

    Args:
        folders: Folders that `eval` commands wrote.
        output_dir: Folder of the report; by default the first of `folders`.
        models: Only these, in this order, by their names in the records; by default all.
        title: Of the page.

    Raises:
        ValueError: A folder holds no records, or none of a model.
        BadRecord: A record is damaged.
    """
    if not folders:
        raise ValueError("expected at least one folder that an `eval` command wrote with --output-dir")
    return render(load_results(folders, models), output_dir or folders[0], title=title)
