"""Tables of a retrieval report, computed from result records and shared by its HTML and Markdown forms."""

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from threetowers.eval.record import EvalRecord

RETRIEVAL = "retrieval"
DIRECTIONS = {"text_to_image": "Text → image", "image_to_text": "Image → text"}
CHANCE = "chance"
ABSENT = "—"


@dataclass(frozen=True)
class Cell:
    """A value as text; `share` (0..1) is the length of the bar behind it, None for no bar."""

    text: str
    best: bool = False
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """`run` is the index of the run the row is about, None for chance and for rows about no one run."""

    heads: tuple[str, ...]
    cells: tuple[Cell, ...]
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """`spans` are headings above the value columns: (text, how many columns)."""

    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    spans: tuple[tuple[str, int], ...] = ()

    def markdown(self) -> str:
        """A pipe table; the best values are bold."""
        columns = self.columns
        if self.spans:
            prefixes = [text for text, count in self.spans for _ in range(count)]
            columns = tuple(f"{prefix} {column}".strip() for prefix, column in zip(prefixes, columns, strict=True))
        lines = [[*self.heads, *columns], ["---"] * len(self.heads) + ["---:"] * len(columns)]
        lines[0] = [markdown_text(text) for text in lines[0]]
        for row in self.rows:
            cells = [f"**{markdown_text(c.text)}**" if c.best else markdown_text(c.text) for c in row.cells]
            lines.append([*map(markdown_text, row.heads), *cells])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def text(self) -> str:
        """The table for a terminal: columns aligned, best values marked with a star."""
        lines = [[*self.heads, *self.columns]]
        lines += [[*row.heads, *(cell.text + "*" * cell.best for cell in row.cells)] for row in self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        names = len(self.heads)
        aligned = [
            "  ".join(
                text.ljust(w) if i < names else text.rjust(w)
                for i, (text, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        if self.spans:
            above, column = " " * (sum(widths[:names]) + 2 * (names - 1)), names
            for text, count in self.spans:
                above += "  " + text.center(sum(widths[column : column + count]) + 2 * (count - 1))
                column += count
            aligned.insert(0, above.rstrip())
        return "\n".join(line.rstrip() for line in aligned)

    def widened(self, span: str, columns: Sequence[str], values: Mapping[int, Sequence[str]]) -> "Table":
        """The table with more columns under a heading of their own: texts by run index, blank where a row has none."""
        blank = [""] * len(columns)
        rows = tuple(
            Row(row.heads, (*row.cells, *map(Cell, blank if row.run is None else values[row.run])), row.run)
            for row in self.rows
        )
        return Table(self.heads, (*self.columns, *columns), rows, (*self.spans, (span, len(columns))))


@dataclass(frozen=True)
class RunRecords:
    """The retrieval records of one run by gallery, for `comparison_table` and its siblings."""

    name: str
    method: str
    galleries: Mapping[str, EvalRecord]


def by_gallery(name: str, method: str, records: Sequence[EvalRecord]) -> RunRecords:
    """Raises ValueError if two retrieval records are about the same gallery."""
    galleries: dict[str, EvalRecord] = {}
    for record in records:
        if record.spec.task != RETRIEVAL:
            continue
        gallery = record.spec.data
        if gallery in galleries:
            raise ValueError(
                f"run {name!r} has two retrieval records for gallery {gallery!r}: pass one record a gallery, or name "
                "the runs apart"
            )
        galleries[gallery] = record
    return RunRecords(name, method, galleries)


def comparison_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """One row a run: recalls and median ranks, means over `galleries`, best of each column marked; None if empty."""
    scored = [(index, run) for index, run in enumerate(runs) if all(name in run.galleries for name in galleries)]
    if not scored or not galleries:
        return None
    keys, spans, columns = _recall_columns(run.galleries[name] for _, run in scored for name in galleries)
    medians = tuple(f"{direction}/median_rank" for direction in DIRECTIONS)
    values = [
        [_mean(run, galleries, key) for key in keys] + [_mean(run, galleries, key) for key in medians]
        for _, run in scored
    ]
    cells = _mark(values, [max] * len(keys) + [min] * len(medians), [_percent] * len(keys) + [_rank] * len(medians))
    rows = [Row((run.name, run.method), row, index) for (index, run), row in zip(scored, cells, strict=True)]
    chance = [_mean(scored[0][1], galleries, key.replace("recall@", "chance@")) for key in keys]
    rows.append(Row((CHANCE, ""), (*(Cell(_percent(value)) for value in chance), *(Cell("") for _ in medians))))
    columns += ("text → image", "image → text")
    return Table(("Run", "Method"), columns, tuple(rows), (*spans, ("Median rank", 2)))


def gallery_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Recalls of every run in every gallery, the best of each marked; None if there are fewer than two galleries."""
    records = [run.galleries[name] for name in galleries for run in runs if name in run.galleries]
    if len(galleries) < 2 or not records:
        return None
    keys, spans, columns = _recall_columns(records)
    rows: list[Row] = []
    for name in galleries:
        scored = [(index, run) for index, run in enumerate(runs) if name in run.galleries]
        values = [[run.galleries[name].metrics.get(key, math.nan) for key in keys] for _, run in scored]
        cells = _mark(values, [max] * len(keys), [_percent] * len(keys))
        rows += [Row((name, run.name), row, index) for (index, run), row in zip(scored, cells, strict=True)]
        metrics = scored[0][1].galleries[name].metrics
        chance = [metrics.get(key.replace("recall@", "chance@"), math.nan) for key in keys]
        rows.append(Row((name, CHANCE), tuple(Cell(_percent(value)) for value in chance)))
    return Table(("Gallery", "Run"), columns, tuple(rows), spans)


def stage_table(names: Sequence[str], stage_seconds: Sequence[Mapping[str, float]]) -> Table | None:
    """Seconds of each stage (rows) in each run (columns) with their sum; None if no stage was timed."""
    longest_first = sorted(stage_seconds, key=len, reverse=True)  # so that a run without a stage does not move it
    stages = list(dict.fromkeys(stage for seconds in longest_first for stage in seconds))
    if not stages:
        return None
    rows = [
        Row((stage,), tuple(Cell(_seconds(run[stage]) if stage in run else ABSENT) for run in stage_seconds))
        for stage in stages
    ]
    rows.append(Row(("all stages",), tuple(Cell(_seconds(sum(run.values()))) for run in stage_seconds)))
    return Table(("Stage",), tuple(names), tuple(rows))


def data_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """What each gallery holds: counts, duplicates, and the start of the digests that identify it."""
    records = {name: next((r.galleries[name] for r in runs if name in r.galleries), None) for name in galleries}
    columns = {
        "images": "images",
        "captions": "captions",
        "groups": "groups",
        "image_duplicates": "all",
        "image_duplicates_across_groups": "across groups",
        "caption_duplicates": "all",
        "caption_duplicates_across_groups": "across groups",
        "image_to_text/excluded": "images",
        "text_to_image/excluded": "captions",
    }
    spans = (("", 3), ("Duplicate images", 2), ("Duplicate captions", 2), ("Without a match", 2), ("Digest of", 2))
    rows = [
        Row(
            (name,),
            (
                *(Cell(_count(record.counts.get(key))) for key in columns),
                Cell(record.sample_ids[:8]),
                Cell(record.texts[:8]),
            ),
        )
        for name, record in records.items()
        if record is not None
    ]
    return Table(("Gallery",), (*columns.values(), "sample ids", "captions"), tuple(rows), spans) if rows else None


def tie_table(runs: Sequence[RunRecords], galleries: Sequence[str]) -> Table | None:
    """Per run and gallery: tied queries of each direction, and R@1 if every tie had been won."""
    rows = []
    for name in galleries:
        for index, run in enumerate(runs):
            if name not in run.galleries:
                continue
            record = run.galleries[name]
            cells = []
            for direction in DIRECTIONS:
                tied, queries = (record.counts.get(f"{direction}/{key}") for key in ("tied", "queries"))
                cells.append(Cell(f"{_count(tied)} of {_count(queries)}"))
                cells.append(Cell(_percent(record.metrics.get(f"{direction}/recall@1", math.nan))))
                cells.append(Cell(_percent(record.metrics.get(f"{direction}/recall@1_optimistic", math.nan))))
            rows.append(Row((name, run.name), tuple(cells), index))
    spans = tuple((text, 3) for text in DIRECTIONS.values())
    columns = ("tied", "R@1 ties lost", "R@1 ties won") * len(DIRECTIONS)
    return Table(("Gallery", "Run"), columns, tuple(rows), spans) if rows else None


def other_table(names: Sequence[str], records: Sequence[Sequence[EvalRecord]]) -> Table | None:
    """Every metric of the records that are not retrieval, a column a run, unranked."""
    values: dict[tuple[str, str, str], dict[int, float]] = {}
    for index, run in enumerate(records):
        for record in run:
            if record.spec.task != RETRIEVAL:
                for metric, value in record.metrics.items():
                    if re.search(r"_seed\d+$", metric):  # their mean and deviation are there
                        continue
                    values.setdefault((record.spec.task, record.spec.data, metric), {})[index] = value
    rows = [
        Row(key, tuple(Cell(f"{found[i]:.4g}" if i in found else ABSENT) for i in range(len(names))))
        for key, found in values.items()
    ]
    return Table(("Task", "Data", "Metric"), tuple(names), tuple(rows)) if rows else None


def tie_gap(run: RunRecords, gallery: str, direction: str) -> float:
    """How far apart the recalls with all ties won and all ties lost are, at the worst k; 0 where nothing is known."""
    metrics = run.galleries[gallery].metrics if gallery in run.galleries else {}
    won = {key: metrics.get(f"{key}_optimistic", value) for key, value in metrics.items()}
    return max((won[key] - metrics[key] for key in metrics if key.startswith(f"{direction}/recall@")), default=0.0)


def markdown_text(text: str) -> str:
    """Text from anywhere as one line of Markdown that renders as itself: no markup, no HTML, no table breaks."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", line)


def _recall_columns(records: Iterable[EvalRecord]) -> tuple[list[str], tuple[tuple[str, int], ...], tuple[str, ...]]:
    """Metric keys of the recalls found in the records, with the headings above them."""
    found = {key for record in records for key in record.metrics}
    ks = sorted({int(match[1]) for key in found if (match := re.fullmatch(r"\w+/recall@(\d+)", key))})
    keys = [f"{direction}/recall@{k}" for direction in DIRECTIONS for k in ks]
    spans = tuple((text, len(ks)) for text in DIRECTIONS.values())
    return keys, spans, tuple(f"R@{k}" for k in ks) * len(DIRECTIONS)


def _mean(run: RunRecords, galleries: Sequence[str], key: str) -> float:
    return math.fsum(run.galleries[name].metrics.get(key, math.nan) for name in galleries) / len(galleries)


def _mark(
    values: Sequence[Sequence[float]],
    better: Sequence[Callable[[list[float]], float]],
    formats: Sequence[Callable[[float], str]],
) -> list[tuple[Cell, ...]]:
    """Cells with the best of each column marked, as printed: equal text is equally good. One row has no best."""
    columns = []
    for column, best_of, text_of in zip(zip(*values, strict=True), better, formats, strict=True):
        known = [value for value in column if not math.isnan(value)]
        best = text_of(best_of(known)) if len(values) > 1 and known else None
        top = max(known, default=0.0) if best_of is max else 0.0
        columns.append([Cell(text_of(v), text_of(v) == best, v / top if top > 0 and v >= 0 else None) for v in column])
    return list(zip(*columns, strict=True))


def _percent(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{100 * value:.1f}"


def _rank(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.1f}"


def _count(value: int | None) -> str:
    return ABSENT if value is None else f"{value:,}"


def _seconds(value: float) -> str:
    if value < 10:
        return f"{value:.2f} s"
    if value < 120:
        return f"{value:.0f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
