"""A run's tokenizer as a `tokenizer.json`, which the packages tokenizers, transformers and open_clip read."""

import base64
import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as messages

from threetowers.cache.encoders.tokenizers.hf_tokenizer import CONFIG, FILE, FOLDER, HfTokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import SpecialTokens, Tokenizer

SPACE = "\u2581"  # SentencePiece's sign for a space
BREAK = "\u0001"  # SentencePiece's own rules delete it, and where there are none it is deleted after them
PIECES = 12  # of a caption by which the two tokenizers are compared
NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5  # types of pieces; the others are user-defined symbols (4) and bytes (6)


def can_write_tokenizer_json(tokenizer: Tokenizer) -> bool:
    """Return whether a kind of tokenizer can be written: SentencePiece models, and those of transformers."""
    return isinstance(tokenizer, SentencePieceTokenizer | HfTokenizer)


def write_tokenizer_json(tokenizer: Tokenizer, context_length: int, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, load the first again, and compare ids.

    A caption's row has `context_length` tokens, as `Tokenizer.encode` returns it. Known difference of SentencePiece
    models: where a letter has several combining marks, the package tokenizers composes other pairs of them.

    Args:
        tokenizer: One for which `can_write_tokenizer_json` is true.
        context_length: Tokens of a row.
        folder: An existing folder.

    Raises:
        ValueError: The format cannot express the tokenizer, captions made of its pieces get other ids, or the package
            tokenizers is missing.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = messages.ModelProto.FromString(tokenizer.model)
        _check_expressible(proto)
        content, config = _of_sentencepiece(proto, tokenizer.special)
        pieces = [str(piece.piece).replace(SPACE, " ") for piece in proto.pieces if piece.type == NORMAL]
    else:
        assert isinstance(tokenizer, HfTokenizer)
        files = tokenizer.files()
        content, config = (json.loads(files[f"{FOLDER}/{name}"]) for name in (FILE, CONFIG))
        pieces = ["a caption, ", "Another one: ", "one that is longer than the rest of them. "]
    _fill_up(content, config, tokenizer.special, context_length)
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    captions = ["".join(pieces[start : start + PIECES]) for start in range(0, len(pieces), PIECES)]
    _compare(tokenizer, folder / FILE, ["", *pieces[:3], *captions], context_length)


def _fill_up(content: dict[str, Any], config: dict[str, Any], special: SpecialTokens, context_length: int) -> None:
    """Let rows be cut and padded to `context_length`."""
    pad = next((token["content"] for token in content["added_tokens"] if token["id"] == special.pad), None)
    if pad is None:
        raise ValueError(
            f"tokenizer.json cannot express this tokenizer: its padding, id {special.pad}, is no special token of its "
            "file. Use --format threetowers"
        )
    content["truncation"] = {
        "direction": "Right",
        "max_length": context_length,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": context_length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": special.pad,
        "pad_type_id": 0,
        "pad_token": pad,
    }
    config |= {"pad_token": pad, "padding_side": "right", "model_max_length": context_length}


def _compare(tokenizer: Tokenizer, path: Path, captions: list[str], context_length: int) -> None:
    """Raise ValueError if a tokenizer.json gives other ids than our tokenizer."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("tokenizers is needed to verify the export: pip install tokenizers") from error
    found = [row.ids for row in tokenizers.Tokenizer.from_file(str(path)).encode_batch(captions)]
    ours = tokenizer.encode(captions, context_length).tolist()
    for caption, ids, expected in zip(captions, found, ours, strict=True):
        if ids != expected:
            raise ValueError(
                f"tokenizer.json cannot express {tokenizer.name}: {caption!r} gets the ids {ids}, expected "
                f"{expected}. Use --format threetowers"
            )


def _of_sentencepiece(proto: Any, special: SpecialTokens) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of tokenizer.json and of tokenizer_config.json."""
    vocab = [[_name(piece), piece.score] for piece in proto.pieces]
    unknown, end = vocab[proto.trainer_spec.unk_id][0], vocab[special.end][0]
    content = {
        "version": "1.0",
        "added_tokens": [
            _added_token(i, vocab[i][0]) for i in sorted({special.pad, proto.trainer_spec.unk_id, special.end})
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,  # a piece may hold several words, if the model was trained so
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {end: {"id": end, "ids": [special.end], "tokens": [end]}},
        },
        "decoder": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        "model": {
            "type": "Unigram",
            "unk_id": proto.trainer_spec.unk_id,
            "vocab": vocab,
            "byte_fallback": False,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # in a caption the name of a special token is text
    }
    return content, config


def _check_expressible(proto: Any) -> None:
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    reasons = []
    if trainer.model_type != trainer.UNIGRAM:
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        reasons.append(f"it is a {kind} model, and only unigram models give the same ids")
    if not {piece.type for piece in proto.pieces} <= {NORMAL, UNKNOWN, CONTROL, UNUSED}:
        reasons.append("it has user-defined symbols or bytes among its pieces")
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        reasons.append("it does not write a space as a sign before the word")
    if reasons:
        raise ValueError(
            f"tokenizer.json cannot express this SentencePiece model: {'; '.join(reasons)}. Use --format threetowers"
        )


def _name(piece: Any) -> str:
    """Return a piece as it is; a special one with a space in it, so that no normalised caption holds it: `< pad>`."""
    name = str(piece.piece)
    return name if piece.type == NORMAL else f"{name[:1]} {name[1:]}"


def _added_token(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content} | flags


def _normalizers(rules: Any) -> list[dict[str, Any]]:
    """Return SentencePiece's normalisation: its table of replacements, then spaces."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        # SentencePiece replaces the longest match. The package tokenizers looks up the shortest beginning of a letter
        # with its marks, and drops the rest: so letters are composed first, and marks that stay get looked up alone.
        steps += [
            {"type": "NFC"},
            _replace({"Regex": "(?=[\\p{M}\u200c\u200d])"}, BREAK),
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(rules.precompiled_charsmap).decode()},
            _replace({"String": BREAK}, ""),
        ]
    if rules.remove_extra_whitespaces:
        steps += [_replace({"Regex": " +"}, " "), _replace({"Regex": "^ | $"}, "")]
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": " "})
    steps.append(_replace({"String": " "}, SPACE))
    return steps


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
