"""The captions of a sample: which of its members hold them, and what is wrong with those that cannot be used.

Training, the tokenizer and the evaluation all find captions here, so that they see the same ones.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import xxhash

from threetowers.cache.webdataset.sample_list import IMAGE_EXTENSIONS

DEFAULT_SOURCES = ("txt", "json.captions", "json.caption")
MAX_CAPTION_SHOWN = 60
JSON = "json"  # the extension, or the last part of the extension, of a member that holds an object with fields
FIELD_EXTENSIONS = frozenset({"json", "cls"})  # of the members that hold fields


class BadText(ValueError):
    """Bytes that are not text, or text that is no caption. The message is a short phrase, for counting."""


@dataclass(frozen=True)
class CaptionFormat:
    """Where the captions of a data set are.

    A *source* is the extension of a text member (`txt`, `cap`, `outputs.txt`), or `json.FIELD`: a field of the `json`
    member that holds a caption or a list of them. The member may have a longer name: `syn.json.FIELD` is a field of
    `KEY.syn.json`. Without sources the captions of a sample are those of the first of
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
            member, name = split_source(source)
            if source in IMAGE_EXTENSIONS or source in ("", JSON) or source.startswith(".") or name == "":
                raise ValueError(
                    f"found {source!r}, expected the extension of a text member, such as txt, or a field of the json "
                    "member, such as json.caption"
                )
            if not 0 < weight < float("inf"):
                raise ValueError(f"found the weight {weight} of {source!r}, expected a positive number")
            if member != member.lower():
                expected = member.lower() if name is None else f"{member.lower()}.{name}"
                raise ValueError(f"found {source!r}, expected {expected!r}: extensions are read in lower case")

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
        return FIELD_EXTENSIONS | {split_source(source)[0] for source in self.sources or DEFAULT_SOURCES}

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
                    captions.append(clean_caption(entry))
                except BadText as error:
                    faults[f"{source}: {error}"] = None
            if captions:
                found[source] = tuple(captions)
        if not self.sources:
            found = dict(list(found.items())[:1])
        return found, tuple(faults)

    def _entries(self, source: str, texts: Mapping[str, bytes], fields: Mapping[str, Any]) -> Sequence[Any]:
        """Return what a source holds: its captions, if they can be used. Raises BadText where they cannot."""
        member, name = split_source(source)
        if name is not None:
            if member != JSON:
                fields = json_object(texts[member]) if member in texts else {}
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

    def draw_places(self, counts: Mapping[str, int], most: int, rng: np.random.Generator) -> list[tuple[str, int]]:
        """Draw different captions of a sample, one after the other as `draw_place` does from those that are left.

        Args:
            counts: How many captions each source has; at least one has some.
            most: How many are drawn of a sample that has as many; one with fewer gives all.
            rng: Random numbers.
        """
        left = {source: list(range(count)) for source, count in counts.items()}
        places: list[tuple[str, int]] = []
        while left and len(places) < most:
            source, at = self.draw_place({name: len(positions) for name, positions in left.items()}, rng)
            places.append((source, left[source].pop(at)))
            if not left[source]:
                del left[source]
        return places


DEFAULT_CAPTIONS = CaptionFormat()


def caption_hash(caption: str) -> int:
    """Return the xxh3_64 of a caption as `CaptionFormat.find` gives it, which a cache stores beside its row."""
    return xxhash.xxh3_64_intdigest(caption.encode())


def split_source(source: str) -> tuple[str, str | None]:
    """Return the extension of the member that a source is in, and its field; None where the whole member is it.

    Examples:
        >>> split_source("outputs.txt"), split_source("json.caption"), split_source("syn.json.syn_text")
        (('outputs.txt', None), ('json', 'caption'), ('syn.json', 'syn_text'))
    """
    parts = source.split(".")
    if JSON not in parts[:-1]:
        return source, None
    end = parts.index(JSON) + 1
    return ".".join(parts[:end]), ".".join(parts[end:])


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


def json_object(data: bytes) -> dict[str, Any]:
    """Return the object in a json member. Raises BadText where there is none."""
    try:
        fields = json.loads(decode_text(data))
    except BadText:
        raise
    except (ValueError, RecursionError):  # the latter for thousands of nested brackets
        raise BadText("not JSON") from None
    if not isinstance(fields, dict):
        raise BadText("not an object")
    return fields


def clean_caption(value: Any) -> str:
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
