"""What can be wrong with one sample. Its neighbours keep their places and are used."""

import enum


class ImageDefect(enum.StrEnum):
    """Why a sample has no usable image, as a phrase to count by. A cache stores it as the status of the same name."""

    UNDECODABLE = "undecodable"
    NO_IMAGE = "no image"
    AMBIGUOUS_IMAGE = "ambiguous image"
    TOO_LARGE = "too large"
    UNKNOWN_FORMAT = "unknown format"
    NOT_A_FILE = "not a file"


class BadSample(ValueError):
    """A sample that cannot be used. The message names its tar and key; `reason` is a phrase to count by."""

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason
