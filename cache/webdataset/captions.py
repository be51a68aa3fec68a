"""The captions of a sample: which of its members hold them, and what is wrong with those that cannot be used.

Training, the tokenizer and the evaluation all find captions here, so that they see the same ones.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import xxhash

from threetowers.cache.webdataset.sample_list import IMAGE_EXTENSIONS

DEFAULT_SOURCES = ("txt", "json.captions", "json.caption")
MAX_CAPTION_SHOWN = 60
FIELD = "json."  # begins a source that is a field of the json member; any other source is the extension of a member
FIELD_EXTENSIONS = frozenset({"json", "cls"})  # of the members that hold fields


class BadText(ValueError):
    """Bytes that are not text, or text that is no caption. The message is a short phrase, for counting."""


@dataclass(frozen=True)
class CaptionFormat:
    """Where the captions of a data set are.

    A *source* is the extension of a text member (`txt`, `cap`, `outputs.txt`), or `json.FIELD`: a field of the `json`
    member that holds a caption or a list of them. Without sources the captions of a sample are those of the first of
    `txt`, `json.captions` and `json.caption` that has any.

    Attributes:
        sources: Weight of each source, by which training draws one.
        caption_per_line: Whether each line of a text member is a caption, as in CLIP_benchmark; otherwise it is one.
    """

    sources: Mapping[str, float] = field(default_factory=dict, hash=False)
    caption_per_line: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for what is no source."""
        for source, weight in self.sources.items():
            if source in IMAGE_EXTENSIONS or source in ("", "json", FIELD) or source.startswith("."):
                raise ValueError(
                    f"found {source!r}, expected the extension of a text member, such as txt, or a field of the json "
                    "member, such as json.caption"
                )
            if not 0 < weight < float("inf"):
                raise ValueError(f"found the weight {weight} of {source!r}, expected a positive number")
            if not source.startswith(FIELD) and source != source.lower():
                raise ValueError(f"found {source!r}, expected {source.lower()!r}: extensions are read in lower case")

    @classmethod
    def parse(cls, items: Sequence[str], caption_per_line: bool = False) -> Self:
        """Return the format that a command line names.

        Args:
            items: Each is SOURCE or SOURCE=WEIGHT.
            caption_per_line: See the class.

        Raises:
            ValueError: An item is neither, or a source is named twice.
        """
        sources: dict[str, float] = {}
        for item in items:
            source, _, number = item.rpartition("=") if "=" in item else (item, "=", "1")
            try:
                weight = float(number)
            except ValueError:
                expected = "expected SOURCE or SOURCE=WEIGHT, as in json.caption=2"
                raise ValueError(f"--captions: found {item!r}, {expected}") from None
            if source in sources:
                raise ValueError(f"--captions: found {source!r} twice, expected each source once")
            sources[source] = weight
        try:
            return cls(sources, caption_per_line)
        except ValueError as error:
            raise ValueError(f"--captions: {error}") from None

    @property
    def extensions(self) -> frozenset[str]:
        """The extensions of the text members that are read: those that may hold captions, and `json` and `cls`."""
        members = {source for source in self.sources or DEFAULT_SOURCES if not source.startswith(FIELD)}
        return FIELD_EXTENSIONS | members

    def sources_text(self) -> str:
        """Return the sources that are looked at, for messages."""
        *others, last = self.sources or DEFAULT_SOURCES
        return f"{', '.join(others)} or {last}" if others else last

    def with_all_sources(self) -> "CaptionFormat":
        """Return the format that finds the captions of every source, also of those that would not be looked at."""
        return self if self.sources else CaptionFormat(dict.fromkeys(DEFAULT_SOURCES, 1.0), self.caption_per_line)

    def find(
        self, texts: Mapping[str, bytes], fields: Mapping[str, Any]
    ) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """Return the captions of a sample by source, in the order of the sources, and what cannot be used.

        White space around a caption is dropped. What is wrong is told by short phrases such as `txt: empty`; a source
        that the sample does not have is not wrong.

        Args:
            texts: The text members, by extension.
            fields: The fields of the `json` member.
        """
        found: dict[str, tuple[str, ...]] = {}
        faults: dict[str, None] = {}
        for source in self.sources or DEFAULT_SOURCES:
            captions = []
            try:
                entries = self._entries(source, texts, fields)
            except BadText as error:
                faults[f"{source}: {error}"] = None
                continue
            for entry in entries:
                try:
                    captions.append(_caption(entry))
                except BadText as error:
                    faults[f"{source}: {error}"] = None
            if captions:
                found[source] = tuple(captions)
        if not self.sources:
            found = dict(list(found.items())[:1])
        return found, tuple(faults)

    def _entries(self, source: str, texts: Mapping[str, bytes], fields: Mapping[str, Any]) -> Sequence[Any]:
        """Return what a source holds: its captions, if they can be used. Raises BadText where they cannot."""
        if source.startswith(FIELD):
            name = source.removeprefix(FIELD)
            if name not in fields:
                return ()
            value = fields[name]
            if value == []:
                raise BadText("empty")
            return value if isinstance(value, list) else [value]
        if source not in texts:
            return ()
        text = decode_text(texts[source])
        if not self.caption_per_line:
            return [text]
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            raise BadText("empty")
        return lines

    def draw(self, found: Mapping[str, tuple[str, ...]], rng: np.random.Generator) -> str:
        """Return one of a sample's captions, as `draw_place` draws it.

        Args:
            found: The captions by source; at least one.
            rng: Random numbers.
        """
        source, position = self.draw_place({name: len(captions) for name, captions in found.items()}, rng)
        return found[source][position]

    def draw_place(self, counts: Mapping[str, int], rng: np.random.Generator) -> tuple[str, int]:
        """Draw one of a sample's captions without its words: its source, and its position among those of the source.

        A source is drawn by weight among those that have captions, then one of its captions. Words and cached rows are
        both drawn so: for the same random numbers they are those of the same caption.

        Args:
            counts: How many captions each source has; at least one has some.
            rng: A number is taken for the source only where there is a choice.
        """
        sources = sorted(counts)  # whatever the order in which a config names them
        source = sources[0]
        if len(sources) > 1:
            ends = np.cumsum([self.sources[name] for name in sources])
            source = sources[int(np.searchsorted(ends[:-1], rng.random() * ends[-1], side="right"))]
        return source, int(rng.integers(counts[source]))


DEFAULT_CAPTIONS = CaptionFormat()


def caption_hash(caption: str) -> int:
    """Return the xxh3_64 of a caption as `CaptionFormat.find` gives it, which a cache stores beside its row."""
    return xxhash.xxh3_64_intdigest(caption.encode())


def shortened(caption: str) -> str:
    """Return the beginning of a caption in quotes, for messages."""
    return repr(caption if len(caption) <= MAX_CAPTION_SHOWN else caption[:MAX_CAPTION_SHOWN] + "...")


def decode_text(data: bytes) -> str:
    """Return the text of a member: UTF-8, or UTF-16 where it begins with the byte order mark of that.

    Other encodings are not guessed.

    Raises:
        BadText: The bytes are in neither encoding, or hold NUL characters, as UTF-16 without a mark does.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise BadText("neither UTF-8 nor UTF-16") from None
    if "\0" in text:
        raise BadText("NUL characters")
    return text


def _caption(value: Any) -> str:
    """Return a caption without the white space around it. Raises BadText for what is none."""
    if value is None:
        raise BadText("null")
    if not isinstance(value, str):
        raise BadText("not text")
    if "\0" in value:
        raise BadText("NUL characters")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may hold half a surrogate pair
        raise BadText("not Unicode") from None
    if not value.strip():
        raise BadText("empty")
    return value.strip()
