"""The tars of a command: which of them can be used, and which of their samples."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar

OnBad = Literal["error", "skip", "skip_tars"]  # bad samples and tars: stop, leave samples out, leave tars out, too
MAX_NAMES_SHOWN = 5


@dataclass(frozen=True)
class TarList:
    """The tars that are used, and the others.

    Attributes:
        tars: With at least one sample each, in the order in which they were given.
        empty: Locations of the tars that hold no sample.
        bad: The message of each bad tar that is left out.
    """

    tars: list[TarIndex]
    empty: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return lines on the tars that are left out, and on members that nothing reads."""
        lines = [f"left out, a bad tar: {message}" for message in self.bad]
        if self.empty:
            shown = ", ".join(self.empty[:MAX_NAMES_SHOWN])
            more = ", ..." if len(self.empty) > MAX_NAMES_SHOWN else ""
            lines.append(f"{len(self.empty)} tars hold no samples: {shown}{more}")
        return lines


def index_tars(
    locations: Iterable[str],
    image_member: str | None = None,
    on_bad: OnBad = "error",
    *,
    map_over: Callable[..., Iterable[TarIndex | BadTar]] = map,
) -> TarList:
    """Index tars, and find all that cannot be used before any is.

    Args:
        locations: Paths or URLs.
        image_member: See `index_tar`.
        on_bad: Whether bad tars are left out (`skip_tars`).
        map_over: Like `map`; that of a pool of threads reads several tars at a time.

    Raises:
        BadTar: Some tars are bad, and are all named; or none holds a sample.
        OSError: A file cannot be read.
    """
    return select_tars(map_over(partial(try_index, image_member=image_member), locations), on_bad)


def try_index(location: str, image_member: str | None = None) -> TarIndex | BadTar:
    """Return the index of a tar, or why it cannot be used."""
    try:
        return index_tar(location, image_member=image_member)
    except BadTar as error:
        return error


def select_tars(found: Iterable[TarIndex | BadTar], on_bad: OnBad = "error") -> TarList:
    """Return the tars that can be used; see `index_tars`."""
    tars: list[TarIndex] = []
    empty: list[str] = []
    bad: list[str] = []
    for tar in found:
        if isinstance(tar, BadTar):
            bad.append(str(tar))
        elif tar.samples:
            tars.append(tar)
        else:
            empty.append(tar.location)
    if on_bad != "skip_tars":
        refuse_bad_tars(bad, len(tars) + len(empty) + len(bad))
    return TarList(tars, empty, bad)


def refuse_bad_tars(bad: Sequence[str], count: int) -> None:
    """Raise BadTar if some of `count` tars are bad, with the message of each."""
    if not bad:
        return
    listed = bad[0] if len(bad) == 1 else "".join(f"\n  {message}" for message in bad)
    raise BadTar(
        f"{len(bad)} of {count} tars cannot be used: {listed}\nRepair or remove them, or leave them out by "
        "on_bad: skip_tars (--on-bad skip_tars)"
    )


def require_samples(listed: TarList) -> TarList:
    """Return the list. Raises BadTar where no tar holds a sample."""
    if not listed.tars:
        reasons = [*listed.bad, *(f"{location}: holds no samples" for location in listed.empty)]
        raise BadTar(f"none of {len(reasons)} tars can be used; the first: {reasons[0]}")
    return listed


def image_defects(tars: Iterable[TarIndex]) -> Counter[str]:
    """Count the samples without a usable image, as far as headers tell, by the reason."""
    counts: Counter[str] = Counter()
    for tar in tars:
        counts.update({str(defect): len(ordinals) for defect, ordinals in tar.samples.defects().items()})
    return counts


def refuse_defects(tars: Sequence[TarIndex]) -> None:
    """Raise BadSample where a sample has no usable image, as far as headers tell: the first by name, and the counts."""
    if first := first_defect(tars):
        raise BadSample(
            f"{first}. Samples like it: {counts_by_reason(image_defects(tars))}. Repair them, or leave them out by "
            "on_bad: skip (--on-bad skip)",
            first.reason,
        )


def require_images(tars: Sequence[TarIndex]) -> None:
    """Raise BadSample where no sample has a usable image, as far as headers tell."""
    counts = image_defects(tars)
    n_samples = sum(len(tar.samples) for tar in tars)
    if counts.total() == n_samples and (first := first_defect(tars)):
        raise BadSample(none_usable(n_samples, counts, str(first)), first.reason)


def none_usable(n_samples: int, counts: Mapping[str, int], first: str) -> str:
    """Return the message for samples of which none can be used."""
    return f"none of {n_samples:,} samples can be used: {counts_by_reason(counts)}; the first: {first}"


def first_defect(tars: Iterable[TarIndex]) -> BadSample | None:
    """Return the first sample without a usable image, as far as headers tell; None where there is none."""
    for tar in tars:
        if defects := tar.samples.defects():
            ordinal = min(int(ordinals[0]) for ordinals in defects.values())
            message = f"{tar.describe(ordinal)}: {tar.describe_defect(ordinal)}"
            return BadSample(message, str(tar.samples[ordinal].defect))
    return None


def left_aside_lines(tars: Iterable[TarIndex], others: Collection[str] = ()) -> list[str]:
    """Return a line on the members of these tars that nothing reads, if there are any; see `TarIndex.left_aside`."""
    counts: Counter[str] = Counter()
    for tar in tars:
        counts.update(tar.left_aside(others))
    return [left_aside_line(counts)] if counts else []


def left_aside_line(counts: Mapping[str, int]) -> str:
    """Return the line on members that nothing reads."""
    return f"members that are not read: {counts_by_reason(counts)}"


def counts_by_reason(counts: Mapping[str, int]) -> str:
    """Return counts as text, the largest first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(counts).most_common() if count)
