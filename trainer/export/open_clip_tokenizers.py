"""The tokenizer of a run as open_clip finds it beside a model: in files, or as the one that it has itself."""

from pathlib import Path
from typing import Any

from threetowers.cache.encoders.openclip.model_config import LOCAL
from threetowers.cache.encoders.tokenizers import sentencepiece_tokenizer
from threetowers.cache.encoders.tokenizers.hf_tokenizer import FILE
from threetowers.cache.encoders.tokenizers.open_clip_tokenizer import (
    ClipTokenizer,
    ExportedTokenizer,
    TransformersTokenizer,
    clip_tokenizer,
)
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.trainer.export.tokenizer_json import can_write_tokenizer_json, write_tokenizer_json

KEPT_KEYS = ("tokenizer_mode", "tokenizer_kwargs")
CAPTIONS = ["a photo of a cat", "", "Two DOGS, 3 birds &amp; a naïve café", "long " * 200]


def tokenizer_is_expressible(tokenizer: Tokenizer) -> bool:
    """Return whether open_clip itself, or files beside a model, can tokenize as the run did."""
    if isinstance(tokenizer, TransformersTokenizer | ExportedTokenizer) or can_write_tokenizer_json(tokenizer):
        return True
    return isinstance(tokenizer, ClipTokenizer) and tokenizer.describe() == clip_tokenizer().describe()


def write_open_clip_tokenizer(tokenizer: Tokenizer, context_length: int, folder: Path) -> dict[str, Any]:
    """Write what open_clip needs of a tokenizer, and return the keys of `text_cfg` by which it takes it.

    Args:
        tokenizer: One that is expressible.
        context_length: Tokens of a row.
        folder: That of the model.
    """
    if isinstance(tokenizer, ClipTokenizer):
        return {}  # which it takes where there are no keys
    if isinstance(tokenizer, TransformersTokenizer):
        tokenizer.save(folder)
        kept = {key: tokenizer.stated[key] for key in KEPT_KEYS if key in tokenizer.stated}
        return {"hf_tokenizer_name": FILE} | kept
    inner = tokenizer.inner if isinstance(tokenizer, ExportedTokenizer) else tokenizer
    write_tokenizer_json(inner, context_length, folder)
    if isinstance(inner, SentencePieceTokenizer):
        (folder / sentencepiece_tokenizer.FILE).write_bytes(inner.model)
    return {"hf_tokenizer_name": FILE}  # the key makes open_clip read it; else it takes CLIP's byte pairs


def check_open_clip_tokenizer(tokenizer: Tokenizer, context_length: int, folder: Path) -> None:
    """Raise ValueError where open_clip gives captions other ids than its own tokenizer gave the run.

    Those of this package are compared as they are written, without what open_clip repairs of a caption before.
    """
    if not isinstance(tokenizer, ClipTokenizer | TransformersTokenizer):
        return
    import open_clip

    theirs = open_clip.get_tokenizer(f"{LOCAL}{folder}")(CAPTIONS)
    ours = tokenizer.encode(CAPTIONS, context_length)
    for caption, found, expected in zip(CAPTIONS, theirs.tolist(), ours.tolist(), strict=True):
        if found != expected:
            raise ValueError(
                f"open_clip cannot express {tokenizer.name}: {caption[:40]!r} gets the ids {found}, expected "
                f"{expected}. Use --format threetowers"
            )
