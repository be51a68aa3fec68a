"""The captions that a tokenizer is trained on: the distinct ones of some tars, or a random sample of these."""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_list import (
    OnBad,
    TarList,
    left_aside_line,
    refuse_bad_tars,
    require_samples,
    try_index,
)
from threetowers.cache.webdataset.tar_patterns import expand

LONGEST = 1 << 16  # bytes of a caption that are used: memory and time of SentencePiece grow with the longest


@dataclass(frozen=True)
class CaptionCorpus:
    """The captions of some tars, as a tokenizer is trained on them.

    Attributes:
        captions: Distinct captions, in the order of their first appearance.
        sampled: Whether there are more distinct captions, of which these are a random sample.
        n_captions: Number of captions that were read, repeated ones included.
        n_samples: Number of samples that they come from.
        n_tars: Number of tars with samples that were read.
        bad_samples: Number of samples left out, by reason.
        first_bad: What is wrong with the first of them; empty where there is none.
        left_out: The tars that are left out, and those without a sample.
        left_aside: Number of members that nothing reads, by the reason (see `TarIndex.left_aside`).
        notes: What of the other samples cannot be used, by short phrases.
    """

    captions: list[str]
    sampled: bool
    n_captions: int
    n_samples: int
    n_tars: int
    bad_samples: Counter[str]
    first_bad: str
    left_out: TarList
    left_aside: Counter[str]
    notes: Counter[str]

    def lines(self) -> list[str]:
        """Return lines that say what was read, what is not used, and why."""
        distinct = f"a sample of {len(self.captions):,}" if self.sampled else f"{len(self.captions):,} distinct"
        return [
            f"captions: {distinct} of {self.n_captions:,}, in {self.n_samples:,} samples of {self.n_tars:,} tars",
            *(f"left out: {count:,}, {reason}" for reason, count in sorted(self.bad_samples.items())),
            *([f"the first: {self.first_bad}"] if self.first_bad else []),
            *self.left_out.notes(),
            *([left_aside_line(self.left_aside)] if self.left_aside else []),
            *(f"noted: {note}, in {count:,} samples" for note, count in sorted(self.notes.items())),
        ]


class DistinctSample:
    """A random sample of distinct texts in bounded memory: those with the smallest hashes.

    Each distinct text is as likely as any other, however often it comes and in whichever order; a text that was passed
    over stays so. With fewer texts than the limit the sample is all of them.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        """Begin a sample of at most `limit` texts."""
        self._limit = limit
        self._seed = seed
        self._held: dict[str, None] = {}
        self._largest: list[tuple[int, str]] = []  # a heap of negated hashes
        self.complete = True  # whether the sample is all texts

    def add(self, text: str) -> None:
        """Take a text into account."""
        if text in self._held:
            return
        entry = (-xxhash.xxh3_64_intdigest(text.encode(), seed=self._seed), text)
        self._held[text] = None
        if len(self._held) <= self._limit:
            heapq.heappush(self._largest, entry)
            return
        self.complete = False
        _, dropped = heapq.heappushpop(self._largest, entry)
        del self._held[dropped]

    def texts(self) -> list[str]:
        """Return the sample, in the order of first appearance."""
        return list(self._held)


def read_corpus(
    tars: Sequence[str],
    captions: CaptionFormat,
    *,
    limit: int,
    seed: int = 0,
    on_bad: OnBad = "skip",
) -> CaptionCorpus:
    """Read the captions of tars, in memory bounded by `limit` distinct captions.

    A caption counts once, however many images have it. One of more than LONGEST bytes is cut.

    Args:
        tars: Tars, globs or brace ranges.
        captions: Where the captions are.
        limit: Largest number of distinct captions that are kept.
        seed: Of the choice among more of them.
        on_bad: Samples without a usable caption, and tars that cannot be read: `error` stops at the first sample,
            `skip` leaves such samples out, `skip_tars` such tars, too.

    Raises:
        BadSample, BadTar: As `on_bad` says, and where no tar holds a sample.
        ValueError: A pattern matches no file.
    """
    distinct = DistinctSample(limit, seed)
    counts = Counter[str]()
    bad_samples, notes = Counter[str](), Counter[str]()
    first_bad = ""
    left_out = TarList([])
    left_aside = Counter[str]()
    paths = expand(tars)
    for path in paths:
        tar = try_index(path)
        if isinstance(tar, BadTar):
            left_out.bad.append(str(tar))
            continue
        if not tar.samples:
            left_out.empty.append(path)
            continue
        counts["tars"] += 1
        if left_out.bad and on_bad != "skip_tars":
            continue  # only to name all bad tars at once
        left_aside.update(tar.left_aside(captions.extensions))
        for ordinal in range(len(tar.samples)):
            try:
                annotation = read_annotation(tar, ordinal, captions=captions)
            except BadSample as error:
                if on_bad == "error":
                    raise BadSample(f"{error}; --on-bad skip leaves such samples out", error.reason) from error
                bad_samples[error.reason] += 1
                first_bad = first_bad or str(error)
                continue
            counts["samples"] += 1
            notes.update(annotation.notes)
            for caption in annotation.captions:
                counts["captions"] += 1
                encoded = caption.encode()
                if len(encoded) > LONGEST:
                    caption = encoded[:LONGEST].decode(errors="ignore")
                    notes[f"caption: cut to {LONGEST:,} bytes"] += 1
                distinct.add(caption)
    if on_bad != "skip_tars":
        refuse_bad_tars(left_out.bad, len(paths))
    if not counts["tars"]:
        require_samples(left_out)
    return CaptionCorpus(
        distinct.texts(),
        not distinct.complete,
        counts["captions"],
        counts["samples"],
        counts["tars"],
        bad_samples,
        first_bad,
        left_out,
        left_aside,
        notes,
    )
