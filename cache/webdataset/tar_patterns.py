"""The files that the patterns of tars name."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from threetowers.cache.storage.remote import glob_urls
from threetowers.cache.storage.storage import is_url


def expand(patterns: Sequence[str | Path]) -> list[str]:
    """Return the tars that match paths or URLs, which may hold globs (`*`, `**`, `?`, `[..]`) or ranges (`{00..99}`).

    They come in the order of the patterns, the matches of a glob sorted by name.

    Raises:
        ValueError: No patterns, one that matches nothing, a command (`pipe:`), or a file that is named twice.
    """
    found: dict[str, tuple[str, str]] = {}
    for pattern in map(str, patterns):
        if pattern.startswith("pipe:"):
            raise ValueError(f"tar {pattern!r} is a command: name the file or URL that it reads")
        for path in _matches(pattern.removeprefix("file://")):
            same = path if is_url(path) else os.path.realpath(path)
            if same in found:
                other, by = found[same]
                raise ValueError(f"{path} (from {pattern!r}) and {other} (from {by!r}) are one file: name it once")
            found[same] = path, pattern
    if not found:
        raise ValueError("no tars given: name at least one file, glob or brace range")
    return [path for path, _ in found.values()]


def _matches(pattern: str) -> list[str]:
    try:
        parts = [pattern] if os.path.isfile(pattern) else list(braceexpand(pattern))
    except ValueError as error:  # unbalanced braces
        raise ValueError(f"tar pattern {pattern!r}: {error}") from None
    paths: list[str] = []
    for part in parts:
        if is_url(part):
            matches = glob_urls(part) if glob.has_magic(part) else [part]  # opened when it is read
        elif os.path.isfile(part):
            matches = [part]
        else:
            matches = sorted(filter(os.path.isfile, glob.glob(part, recursive=True)))
        if not matches:
            inside = f" (from {pattern!r})" if part != pattern else ""
            raise ValueError(f"tar pattern {part!r}{inside} matches no file")
        paths += matches
    return paths
