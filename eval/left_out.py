"""What an evaluation leaves out: images by reason, and how tables and pages tell it beside every number.

A count is kept under its reason, a short phrase, with the part of the data set before it unless that is the evaluated
one: `undecodable`, `train/undecodable`.
"""

from collections.abc import Mapping

NO_CAPTION = "no caption"
NO_LABEL = "no label"
OUTSIDE_FILTER = "outside the filter"
OUTSIDE_SUBSET = "outside the subset"
BAD_TARS = "bad tars"  # counts tars: how many samples they hold is unknown
NOTHING = "nothing"
# What a data set's own keys do not select is no loss: it is told apart from what could not be used.
UNSELECTED = (OUTSIDE_FILTER, OUTSIDE_SUBSET)


def evaluated_images(counts: Mapping[str, int]) -> int:
    """Return how many images were evaluated, by the counts of a record."""
    return counts.get("images", counts.get("original/images", 0))


def left_out_share(images: int, left_out: Mapping[str, int]) -> str:
    """Return what could not be used of the evaluated part, as `40 of 64`; `0` for nothing."""
    own = sum(
        count for reason, count in left_out.items() if "/" not in reason and reason not in (BAD_TARS, *UNSELECTED)
    )
    return f"{own:,} of {own + images:,}" if own else "0"


def is_complete(left_out: Mapping[str, int]) -> bool:
    """Return whether everything that the data set selects was used."""
    return not any(count for name, count in left_out.items() if name.rpartition("/")[2] not in UNSELECTED)


def left_out_text(images: int, left_out: Mapping[str, int]) -> str:
    """Return what was left out and why, as `40 of 64 images: 38 undecodable, 2 no caption; train: 3 undecodable`.

    What was not selected follows: `not selected: 9 outside the filter`.

    Args:
        images: How many images were evaluated.
        left_out: Counts by reason.
    """
    unusable: dict[str, list[str]] = {}
    unselected: dict[str, list[str]] = {}
    for name, count in left_out.items():
        part, _, reason = name.rpartition("/")
        if count:
            by_part = unselected if reason in UNSELECTED else unusable
            by_part.setdefault(part, []).append(f"{count:,} {reason}")
    texts = []
    for part, reasons in unusable.items():
        share = left_out_share(images, left_out)
        head = part or ("" if share == "0" else f"{share} images")
        texts.append(f"{head}: {', '.join(reasons)}" if head else ", ".join(reasons))
    texts = texts or [NOTHING]
    for part, reasons in unselected.items():
        texts.append(f"not selected{f' of {part}' if part else ''}: {', '.join(reasons)}")
    return "; ".join(texts)
