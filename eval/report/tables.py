"""Tables of an evaluation report, computed from records, for its HTML and Markdown forms and for a terminal."""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from threetowers.eval.left_out import evaluated_images, left_out_share, left_out_text
from threetowers.eval.record import EvalRecord

RETRIEVAL = "retrieval"
DIRECTIONS = {"text_to_image": "Text → image", "image_to_text": "Image → text"}
CHANCE = "chance"
NO_VALUE = "—"
LEFT_OUT = "left out"


@dataclass(frozen=True)
class TableCell:
    """A value as text; `share` (0..1) is the length of the bar behind it, None for no bar."""

    text: str
    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class TableRow:
    """Heads and values of one row; `run` is the index of the run that it shows, None for no single run."""

    heads: tuple[str, ...]
    cells: tuple[TableCell, ...]
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of heads and value columns; `spans` are headings above the value columns: (text, number of columns)."""

    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    spans: tuple[tuple[str, int], ...] = ()

    def markdown(self) -> str:
        """Return a pipe table; the best values are bold."""
        prefixes: list[str] = []
        for text, count in self.spans or [("", len(self.columns))]:
            prefixes += [text] * count
        columns = [f"{prefix} {column}".strip() for prefix, column in zip(prefixes, self.columns, strict=True)]
        lines = []
        for row in self.rows:
            line = [markdown_text(head) for head in row.heads]
            for cell in row.cells:
                text = markdown_text(cell.text)
                line.append(f"**{text}**" if cell.best else text)
            lines.append(line)
        return markdown_table([*self.heads, *columns], lines, right_aligned=len(columns))

    def text(self) -> str:
        """Return the table for a terminal: columns aligned, best values marked with a star."""
        lines = [[*self.heads, *self.columns]]
        for row in self.rows:
            lines.append([*row.heads, *(cell.text + "*" * cell.best for cell in row.cells)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        heads = len(self.heads)
        aligned = []
        if self.spans:
            # Each heading is centered over its columns, which are two spaces apart.
            above = " " * (sum(widths[:heads]) + 2 * (heads - 1))
            column = heads
            for text, count in self.spans:
                above += "  " + text.center(sum(widths[column : column + count]) + 2 * (count - 1))
                column += count
            aligned.append(above.rstrip())
        for line in lines:
            cells = [text.ljust(width) for text, width in zip(line[:heads], widths[:heads], strict=True)]
            cells += [text.rjust(width) for text, width in zip(line[heads:], widths[heads:], strict=True)]
            aligned.append("  ".join(cells).rstrip())
        return "\n".join(aligned)

    def widened(self, span: str, columns: Sequence[str], values: Mapping[int, Sequence[str]]) -> "Table":
        """Return the table with more columns under a heading of their own.

        Args:
            span: The heading.
            columns: Names of the columns.
            values: Texts of the columns by run index; they stay blank in rows of no run.
        """
        rows = []
        for row in self.rows:
            texts = [""] * len(columns) if row.run is None else values[row.run]
            rows.append(TableRow(row.heads, (*row.cells, *map(TableCell, texts)), row.run))
        return Table(self.heads, (*self.columns, *columns), tuple(rows), (*self.spans, (span, len(columns))))


@dataclass(frozen=True)
class RunRecords:
    """The retrieval records of one run by gallery, for `comparison_table` and its siblings."""

    name: str
    method: str
    galleries: Mapping[str, EvalRecord]


def by_gallery(name: str, method: str, records: Sequence[EvalRecord]) -> RunRecords:
    """Return the retrieval records of a run by gallery.

    Raises:
        ValueError: If two of them are of the same gallery.
    """
    galleries: dict[str, EvalRecord] = {}
    for record in records:
        if record.spec.task != RETRIEVAL:
            continue
        gallery = record.spec.data
        if gallery in galleries:
            raise ValueError(
                f"run {name!r} has two retrieval records of gallery {gallery!r}, expected one: give the runs "
                "different names"
            )
        galleries[gallery] = record
    return RunRecords(name, method, galleries)


def comparison_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Return a row a run: recalls and median ranks, means over `galleries`, the best of each column marked.

    Runs without a record of each gallery are left out; None if none is left, or for no galleries.
    """
    scored = []
    records = []
    for index, run in enumerate(runs):
        if all(name in run.galleries for name in galleries):
            scored.append((index, run))
            records += [run.galleries[name] for name in galleries]
    if not scored or not galleries:
        return None

    keys, spans, columns = _recall_columns(records)
    medians = [f"{direction}/median_rank" for direction in DIRECTIONS]
    values = []
    for _, run in scored:
        values.append([_mean(run, galleries, key) for key in [*keys, *medians]])
    best = [max] * len(keys) + [min] * len(medians)
    formats = [_percent] * len(keys) + [_rank] * len(medians)
    rows = []
    for (index, run), cells in zip(scored, _marked_cells(values, best, formats), strict=True):
        share = TableCell(_left_out([run.galleries[name] for name in galleries]))
        rows.append(TableRow((run.name, run.method), (*cells, share), index))

    # Chance is the same for every run, and has no median rank.
    chance = [TableCell(_percent(_mean(scored[0][1], galleries, _chance_key(key)))) for key in keys]
    rows.append(TableRow((CHANCE, ""), (*chance, *(TableCell("") for _ in medians), TableCell(""))))
    columns += ("text → image", "image → text", LEFT_OUT)
    return Table(("Run", "Method"), columns, tuple(rows), (*spans, ("Median rank", 2), ("Images", 1)))


def gallery_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Return the recalls of every run in every gallery, the best of each marked; None for fewer than two galleries."""
    records = [run.galleries[name] for name in galleries for run in runs if name in run.galleries]
    if len(galleries) < 2 or not records:
        return None
    keys, spans, columns = _recall_columns(records)
    rows: list[TableRow] = []
    for name in galleries:
        scored = [(index, run) for index, run in enumerate(runs) if name in run.galleries]
        values = []
        for _, run in scored:
            values.append([run.galleries[name].metrics.get(key, math.nan) for key in keys])
        cells = _marked_cells(values, [max] * len(keys), [_percent] * len(keys))
        for (index, run), run_cells in zip(scored, cells, strict=True):
            share = TableCell(_left_out([run.galleries[name]]))
            rows.append(TableRow((name, run.name), (*run_cells, share), index))
        metrics = scored[0][1].galleries[name].metrics
        chance = [TableCell(_percent(metrics.get(_chance_key(key), math.nan))) for key in keys]
        rows.append(TableRow((name, CHANCE), (*chance, TableCell(""))))
    return Table(("Gallery", "Run"), (*columns, LEFT_OUT), tuple(rows), (*spans, ("Images", 1)))


def stage_table(names: Sequence[str], stage_seconds: Sequence[Mapping[str, float]]) -> Table | None:
    """Return the seconds of each stage (rows) in each run (columns) with their sum; None if no stage was timed."""
    stages: dict[str, None] = {}
    for seconds in sorted(stage_seconds, key=len, reverse=True):  # so that a run without a stage does not move it
        stages |= dict.fromkeys(seconds)
    if not stages:
        return None
    rows = []
    for stage in stages:
        cells = [TableCell(_seconds(run[stage]) if stage in run else NO_VALUE) for run in stage_seconds]
        rows.append(TableRow((stage,), tuple(cells)))
    totals = [TableCell(_seconds(sum(run.values()))) for run in stage_seconds]
    rows.append(TableRow(("all stages",), tuple(totals)))
    return Table(("Stage",), tuple(names), tuple(rows))


def data_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Return the counts and duplicates of each gallery, and the start of the digests that identify it."""
    columns = {
        "images": "images",
        "captions": "searched for",
        "captions_merged": "merged",
        "captions_beyond_limit": "over the limit",
        "groups": "groups",
        "image_duplicates": "all",
        "image_duplicates_across_groups": "across groups",
        "caption_duplicates": "all",
        "caption_duplicates_across_groups": "across groups",
        "image_to_text/excluded": "images",
        "text_to_image/excluded": "captions",
    }
    spans = (
        ("", 1),
        ("Captions", 3),
        ("", 1),
        ("Duplicate images", 2),
        ("Duplicate captions", 2),
        ("Without a match", 2),
        ("Digest of", 2),
        ("Left out", 1),
    )
    rows = []
    for name in galleries:
        records = [run.galleries[name] for run in runs if name in run.galleries]
        if records:
            counts = [TableCell(_count(records[0].counts.get(key))) for key in columns]
            digests = (TableCell(records[0].sample_ids[:8]), TableCell(records[0].texts[:8]))
            reasons = TableCell(left_out_text(evaluated_images(records[0].counts), records[0].left_out))
            rows.append(TableRow((name,), (*counts, *digests, reasons)))
    names = (*columns.values(), "sample ids", "captions", "images")
    return Table(("Gallery",), names, tuple(rows), spans) if rows else None


def tie_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Return, by gallery and run, the tied queries of each direction, and R@1 with every tie lost and won."""
    rows = []
    for name in galleries:
        for index, run in enumerate(runs):
            if name not in run.galleries:
                continue
            record = run.galleries[name]
            cells = []
            for direction in DIRECTIONS:
                tied = record.counts.get(f"{direction}/tied")
                queries = record.counts.get(f"{direction}/queries")
                cells.append(TableCell(f"{_count(tied)} of {_count(queries)}"))
                cells.append(TableCell(_percent(record.metrics.get(f"{direction}/recall@1", math.nan))))
                cells.append(TableCell(_percent(record.metrics.get(f"{direction}/recall@1_optimistic", math.nan))))
            rows.append(TableRow((name, run.name), tuple(cells), index))
    spans = tuple((text, 3) for text in DIRECTIONS.values())
    columns = ("tied", "R@1 ties lost", "R@1 ties won") * len(DIRECTIONS)
    return Table(("Gallery", "Run"), columns, tuple(rows), spans) if rows else None


def other_table(names: Sequence[str], records: Sequence[Sequence[EvalRecord]]) -> Table | None:
    """Return every metric of the records of other tasks than retrieval, a column a run; no value is marked as best."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    shares: dict[tuple[str, str], dict[str, None]] = {}
    for index, run in enumerate(records):
        for record in run:
            if record.spec.task == RETRIEVAL:
                continue
            shares.setdefault((record.spec.task, record.spec.data), {})[_left_out([record])] = None
            for metric, value in record.metrics.items():
                if not re.search(r"_seed\d+$", metric):  # the mean and the deviation over seeds are shown instead
                    values.setdefault((record.spec.task, record.spec.data, metric), {})[index] = value
    rows = []
    for key, by_run in values.items():
        cells = [TableCell(f"{by_run[i]:.4g}" if i in by_run else NO_VALUE) for i in range(len(names))]
        share = TableCell(" / ".join(shares[key[:2]]))
        rows.append(TableRow(key, (*cells, share)))
    return Table(("Task", "Data", "Metric"), (*names, LEFT_OUT), tuple(rows)) if rows else None


def tie_gap(run: RunRecords, gallery: str, direction: str) -> float:
    """Return the largest difference, over k, of the recalls with all ties won and lost; 0 for a missing record."""
    if gallery not in run.galleries:
        return 0.0
    metrics = run.galleries[gallery].metrics
    gaps = []
    for key, value in metrics.items():
        if key.startswith(f"{direction}/recall@"):
            gaps.append(metrics.get(f"{key}_optimistic", value) - value)
    return max(gaps, default=0.0)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right_aligned: int = 0) -> str:
    """Return a pipe table of plain heads and of rows of Markdown, the last `right_aligned` columns to the right."""
    rule = ["---"] * (len(heads) - right_aligned) + ["---:"] * right_aligned
    lines = [[markdown_text(head) for head in heads], rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """Return any text as one line of Markdown that renders as itself: no markup, no HTML, no table breaks."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", line)


def _recall_columns(records: Iterable[EvalRecord]) -> tuple[list[str], tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Return the keys of the recalls in some records, the headings above them, and the names of their columns."""
    found = set()
    for record in records:
        for key in record.metrics:
            match = re.fullmatch(r"\w+/recall@(\d+)", key)
            if match:
                found.add(int(match[1]))
    ks = sorted(found)
    keys = [f"{direction}/recall@{k}" for direction in DIRECTIONS for k in ks]
    spans = tuple((text, len(ks)) for text in DIRECTIONS.values())
    return keys, spans, tuple(f"R@{k}" for k in ks) * len(DIRECTIONS)


def _left_out(records: Sequence[EvalRecord]) -> str:
    """Return how many images were left out of how many, over some records.

    The galleries of one data set name the same images.
    """
    left_out: Counter[str] = Counter()
    seen = set()
    for record in records:
        key = (record.spec.tars, record.spec.settings.get("images"), tuple(sorted(record.left_out.items())))
        if key not in seen:
            seen.add(key)
            left_out.update(record.left_out)
    return left_out_share(sum(evaluated_images(record.counts) for record in records), left_out)


def _chance_key(recall_key: str) -> str:
    return recall_key.replace("recall@", "chance@")


def _mean(run: RunRecords, galleries: Sequence[str], key: str) -> float:
    return math.fsum(run.galleries[name].metrics.get(key, math.nan) for name in galleries) / len(galleries)


def _marked_cells(
    values: Sequence[Sequence[float]],
    best: Sequence[Callable[[list[float]], float]],
    formats: Sequence[Callable[[float], str]],
) -> list[tuple[TableCell, ...]]:
    """Return rows of cells with the best of each column marked, and a bar where larger is better.

    Values are compared as printed: equal text is equally good. A single row has no best.
    """
    columns = []
    for column, best_of, format_value in zip(zip(*values, strict=True), best, formats, strict=True):
        known = [value for value in column if not math.isnan(value)]
        best_text = format_value(best_of(known)) if len(values) > 1 and known else None
        longest = max(known, default=0.0) if best_of is max else 0.0
        cells = []
        for value in column:
            text = format_value(value)
            share = value / longest if longest > 0 and value >= 0 else None
            cells.append(TableCell(text, text == best_text, share))
        columns.append(cells)
    return list(zip(*columns, strict=True))


def _percent(value: float) -> str:
    return NO_VALUE if math.isnan(value) else f"{100 * value:.1f}"


def _rank(value: float) -> str:
    return NO_VALUE if math.isnan(value) else f"{value:.1f}"


def _count(value: int | None) -> str:
    return NO_VALUE if value is None else f"{value:,}"


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
