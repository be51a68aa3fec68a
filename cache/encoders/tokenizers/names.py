"""Tokenizers by name: a `.model` file of SentencePiece, `hf:FOLDER_OR_FILE` or `open_clip:NAME`."""

from collections.abc import Callable
from pathlib import Path

from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import FILE, SentencePieceTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer


def load_named_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: One of

            - the path of a SentencePiece model (`.model`), with any layout of ids;
            - `hf:FOLDER_OR_FILE`: a fast tokenizer of transformers, by its folder, its `tokenizer.json` or its name on
              the hub;
            - `open_clip:NAME`: that of a model of open_clip; CLIP's own is in its package (`open_clip:ViT-B-32`).

    Raises:
        MissingTokenizer: There is no such file or folder.
        ValueError: It is not a tokenizer, or the package that it needs is not installed.
    """
    kind, colon, source = name.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](source)
    return SentencePieceTokenizer.load(name)


def load_kept_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer from a folder that holds its `files()`.

    Raises:
        MissingTokenizer: There is none.
        ValueError: It is damaged.
    """
    from threetowers.cache.encoders.tokenizers import hf_tokenizer, open_clip_tokenizer

    if (folder / hf_tokenizer.FOLDER / hf_tokenizer.FILE).is_file():
        return hf_tokenizer.load_hf_tokenizer(str(folder / hf_tokenizer.FOLDER))
    if (folder / open_clip_tokenizer.FILE).is_file():
        return open_clip_tokenizer.load_kept_name(folder / open_clip_tokenizer.FILE)
    return SentencePieceTokenizer.load(folder / FILE)


def _load_hf(source: str) -> Tokenizer:
    from threetowers.cache.encoders.tokenizers.hf_tokenizer import load_hf_tokenizer

    return load_hf_tokenizer(source)


def _load_open_clip(source: str) -> Tokenizer:
    from threetowers.cache.encoders.tokenizers.open_clip_tokenizer import load_open_clip_tokenizer

    return load_open_clip_tokenizer(source)


KINDS: dict[str, Callable[[str], Tokenizer]] = {"hf": _load_hf, "open_clip": _load_open_clip}
