"""The samples of a tar: their keys, where their members lie, and which member is the image of each."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt

from threetowers.cache.webdataset.defects import ImageDefect
from threetowers.cache.webdataset.tar_headers import NOT_A_FILE, Member

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif"})
TEXT_EXTENSIONS = frozenset({"txt", "json", "cls"})
# Images too, by their names, but of formats that are not decoded
OTHER_IMAGE_EXTENSIONS = frozenset(
    {"tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "j2k", "svg", "ico", "psd", "ppm", "pgm", "tga", "dng", "cr2"}
)
MAX_MEMBER_BYTES = 64 << 20  # of an image or text; a larger one is never read
MAX_UNREAD_KINDS = 20
MAX_MEMBERS_SHOWN = 8
DEFECTS = tuple(ImageDefect)


class Sample(NamedTuple):
    """One sample.

    Attributes:
        key: Its webdataset key.
        members: Its members by lower-cased extension.
        image: The extension of its image; None where there is none, or no single one.
        defect: What is wrong with its image, as far as headers tell; None where nothing is.
    """

    key: str
    members: dict[str, Member]
    image: str | None
    defect: ImageDefect | None


def unreadable(member: Member) -> ImageDefect | None:
    """Return why a member is never read; None where it can be."""
    if member == NOT_A_FILE:
        return ImageDefect.NOT_A_FILE
    return ImageDefect.TOO_LARGE if member.size > MAX_MEMBER_BYTES else None


class SampleList(Sequence[Sample]):
    """The samples of a tar in order, held as a few arrays: millions of samples stay small, and forks share them.

    The image of a sample is its member `image_member`, an extension as `jpg` or `left.jpg`; or, where that is None, its
    only member with one of IMAGE_EXTENSIONS. Another way to write the extension is a ValueError.
    """

    def __init__(self, samples: Sequence[tuple[str, Mapping[str, Member]]], image_member: str | None = None) -> None:
        keys = [key.encode() for key, _ in samples]
        members = [item for _, of_sample in samples for item in of_sample.items()]
        self._extensions = tuple(sorted({extension for extension, _ in members}))
        code = {extension: i for i, extension in enumerate(self._extensions)}
        self._keys = np.frombuffer(b"".join(keys), np.uint8)
        self._key_ends = np.cumsum([0, *map(len, keys)], dtype=np.int64)
        self._member_ends = np.cumsum([0, *(len(of_sample) for _, of_sample in samples)], dtype=np.int64)
        self._codes = np.array([code[extension] for extension, _ in members], dtype=np.uint32)
        self._members = np.array([member for _, member in members], dtype=np.int64).reshape(-1, 2)
        self._find_images(image_member)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that `from_arrays` reads; none holds Python objects."""
        return {
            "extensions": np.array(self._extensions, np.str_),
            "keys": self._keys,
            "key_ends": self._key_ends,
            "member_ends": self._member_ends,
            "codes": self._codes,
            "members": self._members,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], image_member: str | None = None) -> Self:
        """Return the samples whose `to_arrays` these are, whichever their image member was.

        Raises:
            KeyError: An array is missing.
        """
        samples = cls([])
        samples._extensions = tuple(arrays["extensions"].tolist())
        samples._keys = arrays["keys"]
        samples._key_ends = arrays["key_ends"]
        samples._member_ends = arrays["member_ends"]
        samples._codes = arrays["codes"]
        samples._members = arrays["members"]
        samples._find_images(image_member)
        return samples

    def __len__(self) -> int:
        return len(self._key_ends) - 1

    @overload
    def __getitem__(self, ordinal: int) -> Sample: ...

    @overload
    def __getitem__(self, ordinal: slice) -> list[Sample]: ...

    def __getitem__(self, ordinal: int | slice) -> Sample | list[Sample]:
        if isinstance(ordinal, slice):
            return [self[i] for i in range(*ordinal.indices(len(self)))]
        if not -len(self) <= ordinal < len(self):
            raise IndexError(f"sample {ordinal} of {len(self)}")
        ordinal %= len(self)
        start, end = self._member_ends[ordinal : ordinal + 2]
        members = {self._extensions[self._codes[i]]: Member(*self._members[i].tolist()) for i in range(start, end)}
        image = None if self._image_n[ordinal] < 0 else self._extensions[self._image_n[ordinal]]
        defect = DEFECTS[self._defect_n[ordinal]] if self._defect_n[ordinal] < len(DEFECTS) else None
        return Sample(self.key(ordinal), members, image, defect)

    def key(self, ordinal: int) -> str:
        """Return the key of a sample without its members; joining a cache needs no more."""
        return self._keys[self._key_ends[ordinal] : self._key_ends[ordinal + 1]].tobytes().decode()

    def defects(self) -> dict[ImageDefect, npt.NDArray[np.int64]]:
        """Return the ordinals of the samples without a usable image, by what is wrong as far as headers tell."""
        found = {defect: np.flatnonzero(self._defect_n == code) for code, defect in enumerate(DEFECTS)}
        return {defect: ordinals for defect, ordinals in found.items() if len(ordinals)}

    def start(self, ordinal: int) -> int:
        """Return the end of the last byte, in the tar, that a sample before this one has: its own headers follow."""
        before = self._members[: self._member_ends[ordinal]]
        return int(before.sum(axis=1).max(initial=0))

    def apart(self) -> set[tuple[str, str]]:
        """Return (key, extension) of the members that are not met on the way through the tar, or too large to be read.

        These are hard links, whose bytes are those of an earlier member, and what is no plain file at all.
        """
        offset_m, size_m = self._members.T
        latest_m = np.maximum.accumulate(np.concatenate([[-1], offset_m[:-1]]))[: len(offset_m)]
        rows = np.flatnonzero((offset_m <= latest_m) | (offset_m < 0) | (size_m > MAX_MEMBER_BYTES))
        ordinals = np.searchsorted(self._member_ends, rows, "right") - 1
        codes = self._codes[rows]
        return {
            (self.key(ordinal), self._extensions[code])
            for ordinal, code in zip(ordinals.tolist(), codes.tolist(), strict=True)
        }

    def unread(self, others: Collection[str] = ()) -> Counter[str]:
        """Count the members that are neither images nor texts, nor among `others` that are read, by extension.

        Extensions of several parts, such as `1.jpg`, are counted together by the last.
        """
        read = self.image_extensions | TEXT_EXTENSIONS | set(others)
        counts = np.bincount(self._codes, minlength=len(self._extensions)).tolist()
        found: Counter[str] = Counter()
        for extension, count in zip(self._extensions, counts, strict=True):
            if extension not in read:
                first, dot, last = extension.rpartition(".")
                found[f".*.{last}" if dot and first else f".{extension}"] += count
        shown = Counter(dict(found.most_common(MAX_UNREAD_KINDS)))
        if rest := found.total() - shown.total():
            shown["others"] = rest
        return shown

    @property
    def image_extensions(self) -> frozenset[str]:
        """The extensions that an image may have."""
        return IMAGE_EXTENSIONS if self.image_member is None else frozenset({self.image_member})

    def _find_images(self, image_member: str | None) -> None:
        """Find the image of each sample, and the samples that have none or several, or one that cannot be read."""
        if image_member is not None and image_member != image_member.lower().lstrip("."):
            raise ValueError(
                f"image_member (--image-member): found {image_member!r}, expected an extension in lower case and "
                f"without the first dot: {image_member.lower().lstrip('.')}"
            )
        self.image_member = image_member
        n = len(self)
        sample_m = np.repeat(np.arange(n), np.diff(self._member_ends))

        def having(extensions: frozenset[str]) -> npt.NDArray[np.intp]:
            is_one = np.array([extension in extensions for extension in self._extensions], bool)
            return np.flatnonzero(is_one[self._codes])

        images = having(self.image_extensions)
        sample_of = sample_m[images]
        count_n = np.bincount(sample_of, minlength=n)
        self._image_n = np.full(n, -1, np.int32)
        self._image_n[sample_of] = self._codes[images]
        self._image_n[count_n != 1] = -1

        # From the least to the most telling: a later one replaces an earlier one.
        sound = len(DEFECTS)
        self._defect_n = np.full(n, sound, np.uint8)
        offset_m, size_m = self._members[images].T
        self._defect_n[sample_of[size_m > MAX_MEMBER_BYTES]] = DEFECTS.index(ImageDefect.TOO_LARGE)
        self._defect_n[sample_of[offset_m < 0]] = DEFECTS.index(ImageDefect.NOT_A_FILE)
        self._defect_n[count_n > 1] = DEFECTS.index(ImageDefect.AMBIGUOUS_IMAGE)
        self._defect_n[count_n == 0] = DEFECTS.index(ImageDefect.NO_IMAGE)
        if image_member is None:
            other_n = np.zeros(n, bool)
            other_n[sample_m[having(OTHER_IMAGE_EXTENSIONS)]] = True
            self._defect_n[(count_n == 0) & other_n] = DEFECTS.index(ImageDefect.UNKNOWN_FORMAT)


def describe_defect(sample: Sample, image_member: str | None) -> str:
    """Return what is wrong with the image of a sample, as a sentence: what was found and what was expected."""
    found = members_text(sample.members)
    expected = f"one of {sorted(IMAGE_EXTENSIONS)}" if image_member is None else f"a member .{image_member}"
    rule = "the extension is all that follows the first dot of the name"
    remedy = "image_member (--image-member) names the image"
    match sample.defect:
        case ImageDefect.NO_IMAGE:
            return f"no image: found members {found}, expected {expected} ({rule}; {remedy})"
        case ImageDefect.AMBIGUOUS_IMAGE:
            return f"ambiguous image: found members {found}, expected only {expected} ({remedy})"
        case ImageDefect.UNKNOWN_FORMAT:
            return f"unknown format: found members {found}, expected {expected}"
    if sample.image is None:
        return "nothing is wrong"
    return describe_unreadable(sample.image, sample.members[sample.image])


def members_text(members: Collection[str]) -> str:
    """Return the extensions of a sample's members, for messages: the first few of many."""
    found = sorted(members)
    more = f" and {len(found) - MAX_MEMBERS_SHOWN:,} more" if len(found) > MAX_MEMBERS_SHOWN else ""
    return f"{found[:MAX_MEMBERS_SHOWN]}{more}"


def describe_unreadable(extension: str, member: Member) -> str:
    """Return why a member is never read, as a sentence."""
    if member == NOT_A_FILE:
        return f"not a file: .{extension} is a link, device or sparse file, expected a plain file"
    return f"too large: .{extension} has {member.size} bytes, expected at most {MAX_MEMBER_BYTES}"
