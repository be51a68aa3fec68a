"""Captions to the tokens of open_clip's models, by each of the tokenizers that they have."""

import hashlib
import json
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from threetowers.cache.encoders.huggingface.loading import require
from threetowers.cache.encoders.huggingface.tokenizer import tokenizer_digest, tokens_of
from threetowers.cache.encoders.openclip.model_config import CONFIG, model_folder, read_open_clip_config
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import MissingTokenizer, SpecialTokens, Tokenizer, Tokens
from threetowers.cache.encoders.weights_file import one_line

KIND = "open_clip"
FILE = "tokenizer/open_clip.json"  # of a run folder
FOLDER = "tokenizer/open_clip"  # of a run folder: what is needed of the folder of a model
KEYS = ("context_length", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")  # of its config
CLIP_NAME = "ViT-B-32"  # a model with CLIP's own tokenizer


class OpenClipTokenizer(Tokenizer):
    """A tokenizer as open_clip uses it, without its padding.

    Attributes:
        context_length: Tokens that a model takes, special ones included.
        pad_id: The token that fills up a row.
        pads_left: Whether it is put before a caption.
        stated: The keys of the model's config that it comes from.
    """

    name = f"{KIND}:{CLIP_NAME}"
    context_length: int
    pad_id: int = 0
    pads_left: bool = False
    stated: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return all that decides the tokens, as JSON."""

    @property
    def digest(self) -> str:
        """The sha256 of all that decides the tokens."""
        state = self.describe() | {"context": self.context_length, "pad": self.pad_id, "left": self.pads_left}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files by which open_clip finds it beside a model; CLIP's own is in its package."""

    def files(self) -> Mapping[str, bytes]:
        """Return its name and digest, as open_clip holds the tokenizer itself; that of a folder, with its files."""
        kept = {FILE: json.dumps({"name": self.name, "digest": self.digest}, indent=2).encode()}
        if model_folder(self.name.removeprefix(f"{KIND}:")) is None:
            return kept
        kept[f"{FOLDER}/{CONFIG}"] = json.dumps({"model_cfg": {"text_cfg": self.stated}}, indent=2).encode()
        with tempfile.TemporaryDirectory() as temporary:
            self.save(Path(temporary))
            kept |= {f"{FOLDER}/{path.name}": path.read_bytes() for path in Path(temporary).iterdir()}
        return kept


class ClipTokenizer(OpenClipTokenizer):
    """CLIP's own byte pairs (open_clip's `SimpleTokenizer`)."""

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip. Raises ValueError for one that leaves out tokens of long captions at random."""
        if tokenizer.reduction_fn is not None:
            raise ValueError(
                "tokenizer_kwargs.reduction_mask: expected none, as it is for training, found one: leave it out of "
                "open_clip_config.json"
            )
        self._tokenizer = tokenizer
        self.context_length = tokenizer.context_length

    @property
    def special(self) -> SpecialTokens:
        """CLIP's start and end; it pads with the id of a word, and has bytes for all that is unknown."""
        return SpecialTokens(self._tokenizer.eot_token_id, self.pad_id, self._tokenizer.sot_token_id)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._tokenizer.vocab_size)

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut before its end token."""
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        pieces = (self._tokenizer.encode(text) for text in texts)
        return [Tokens([start, *ids[: max_length - 2], end], len(ids) > max_length - 2) for ids in pieces]

    def describe(self) -> dict[str, Any]:
        """Return vocabulary, merges, pattern and cleaning."""
        merges = sorted(self._tokenizer.bpe_ranks, key=self._tokenizer.bpe_ranks.get)
        return {
            "vocabulary": self._tokenizer.encoder,
            "merges": [list(pair) for pair in merges],
            "pattern": self._tokenizer.pat.pattern,
            "clean": _name(self._tokenizer.clean_fn),
        }


class TransformersTokenizer(OpenClipTokenizer):
    """A tokenizer of transformers inside open_clip (`HFTokenizer`, `SigLipTokenizer`)."""

    packages = ("transformers",)

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip."""
        self._tokenizer = tokenizer.tokenizer
        self._clean: Callable[[str], str] = getattr(tokenizer, "clean_fn", None) or _siglip_clean
        self._strip = bool(getattr(tokenizer, "strip_sep_token", False))
        self.context_length = tokenizer.context_length
        self.pad_id = self._tokenizer.pad_token_id
        if self._strip and self.pad_id == self._tokenizer.sep_token_id:
            self.pad_id = 0
        self.pads_left = self._tokenizer.padding_side == "left"

    @property
    def special(self) -> SpecialTokens:
        """The special tokens. Raises ValueError where captions do not end in one."""
        last = {tuple(row.ids)[-1] for row in self.tokenize(["", "a b"], self.context_length) if row.ids}
        if len(last) != 1:
            raise ValueError(f"{self.name}: found no token at the end of all captions, expected one: choose another")
        start = self._tokenizer.bos_token_id
        return SpecialTokens(last.pop(), self.pad_id, start, self._tokenizer.unk_token_id)

    @property
    def vocab_size(self) -> int:
        """The largest id of a token, plus one."""
        return 1 + int(max(self._tokenizer.get_vocab().values()))

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut as the tokenizer does it."""
        rows = tokens_of(self._tokenizer, [self._clean(text) for text in texts], max_length)
        if not self._strip:
            return rows
        separator = self._tokenizer.sep_token_id
        return [Tokens([0 if i == separator else i for i in row.ids], row.cut) for row in rows]

    def save(self, folder: Path) -> None:
        """Write the files of transformers, by which open_clip finds it beside a model."""
        self._tokenizer.save_pretrained(folder)

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's digest, and what open_clip does before and after it."""
        return {"tokenizer": tokenizer_digest(self._tokenizer), "clean": _name(self._clean), "strip": self._strip}


class ClipsTokenizer(OpenClipTokenizer):
    """A tokenizer of transformers in the mode of CLIPS: a class token ends each row, behind the padding."""

    packages = ("transformers",)

    def __init__(self, tokenizer: Any) -> None:
        """Use a tokenizer of open_clip."""
        self._clips = tokenizer
        self.context_length = tokenizer.context_length

    @property
    def special(self) -> SpecialTokens:
        """Raises ValueError, as a row ends in its padding and a class token."""
        raise ValueError(
            f"{self.name}: found a class token behind the padding of captions (CLIPS), expected captions that end "
            "before it: choose the tokenizer of another model"
        )

    @property
    def vocab_size(self) -> int:
        """The largest id of a token, plus one."""
        return 1 + int(max(self._clips.tokenizer.get_vocab().values()))

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the row of each text, padding included, as no token is at its end."""
        if not texts:
            return []
        rows = self._clips(list(texts), max_length).tolist()
        cleaned = [self._clips.clean_fn(text) for text in texts]
        pieces = self._clips.tokenizer(cleaned, add_special_tokens=False, verbose=False).input_ids
        return [Tokens(row, len(ids) > max_length - 3) for row, ids in zip(rows, pieces, strict=True)]

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's digest, and what open_clip does before and after it."""
        return {
            "tokenizer": tokenizer_digest(self._clips.tokenizer),
            "clean": _name(self._clips.clean_fn),
            "mode": "clips",
        }


class ExportedTokenizer(OpenClipTokenizer):
    """The SentencePiece tokenizer of a model that this package exported."""

    packages = ("sentencepiece",)

    def __init__(self, tokenizer: SentencePieceTokenizer, context_length: int) -> None:
        """Use a tokenizer of this package."""
        self.inner = tokenizer
        self.context_length = context_length
        self.pad_id = tokenizer.special.pad

    @property
    def special(self) -> SpecialTokens:
        """Those of the model."""
        return self.inner.special

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.inner.vocab_size

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut before its end token."""
        return self.inner.tokenize(texts, max_length)

    def describe(self) -> dict[str, Any]:
        """Return the digest of the SentencePiece model."""
        return {"sentencepiece": self.inner.digest}

    def files(self) -> Mapping[str, bytes]:
        """Return the model."""
        return self.inner.files()


def load_open_clip_tokenizer(name: str) -> OpenClipTokenizer:
    """Load the tokenizer of a model of open_clip, by the model's name.

    Raises:
        MissingTokenizer: There is no such folder.
        ValueError: There is no such model, or its tokenizer cannot be loaded, or open_clip is not installed.
    """
    require("open_clip", KIND, KIND)
    import open_clip

    folder = Path(name.removeprefix("local-dir:"))
    if (folder / "tokenizer.model").is_file():
        tokenizer = SentencePieceTokenizer.load(folder / "tokenizer.model")
        found: OpenClipTokenizer = ExportedTokenizer(tokenizer, int(_json_config(folder)["context_length"]))
    else:
        if "/" in name and ":" not in name and not folder.is_dir():
            raise MissingTokenizer(
                f"{KIND}:{name}: no such folder; name one that a model was saved to, or hf-hub:ORG/NAME"
            )
        known = name if ":" in name else f"local-dir:{name}" if folder.is_dir() else name
        if ":" not in known and known not in open_clip.list_models():  # open_clip would give CLIP's
            raise ValueError(
                f"{KIND}:{name}: found no such model in open_clip, expected one of open_clip.list_models(), as "
                f"{KIND}:{CLIP_NAME}, hf-hub:ORG/NAME or a folder"
            )
        try:
            found = open_clip_tokenizer(open_clip.get_tokenizer(known))
        except Exception as error:  # hub, network and transformers each raise their own kinds
            raise ValueError(
                f"{KIND}:{name}: its tokenizer cannot be loaded: {one_line(error)}; without a connection, download its "
                "files and name their folder instead"
            ) from error
    found.name = f"{KIND}:{name}"
    text = _json_config(folder) if folder.is_dir() else read_open_clip_config(name).text
    found.stated = {key: text[key] for key in KEYS if key in text}
    return found


def _json_config(folder: Path) -> Mapping[str, Any]:
    """Return the section of the text tower in a folder's config, of which a kept one has no other section."""
    text: Mapping[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    return text


def clip_tokenizer() -> ClipTokenizer:
    """Return CLIP's own tokenizer, which open_clip uses where a model names no other one."""
    require("open_clip", KIND, KIND)
    from open_clip.tokenizer import SimpleTokenizer

    return ClipTokenizer(SimpleTokenizer())


def load_kept_name(path: Path) -> OpenClipTokenizer:
    """Load the tokenizer that a run folder names. Raises ValueError where open_clip now has another one of the name."""
    kept = json.loads(path.read_text())
    folder = path.parent / Path(FOLDER).name
    found = load_open_clip_tokenizer(str(folder) if folder.is_dir() else kept["name"].removeprefix(f"{KIND}:"))
    found.name = kept["name"]
    if found.digest != kept["digest"]:
        raise ValueError(
            f"{path}: {kept['name']} had the sha256 {kept['digest'][:12]} in training, and has "
            f"{found.digest[:12]} now: install the version of open_clip that the run was trained with, "
            "or restore the model's files"
        )
    return found


def open_clip_tokenizer(tokenizer: Any) -> OpenClipTokenizer:
    """Return one of open_clip's tokenizers as what it is, known by its parts. Raises ValueError for other ones."""
    if hasattr(tokenizer, "bpe_ranks"):
        return ClipTokenizer(tokenizer)
    mode = getattr(tokenizer, "tokenizer_mode", "")
    if hasattr(tokenizer, "tokenizer") and mode in ("", "clips"):
        return ClipsTokenizer(tokenizer) if mode else TransformersTokenizer(tokenizer)
    raise ValueError(f"expected CLIP's tokenizer or one of transformers, found {type(tokenizer).__name__} {mode!r}")


def _siglip_clean(text: str) -> str:
    from open_clip.tokenizer import basic_clean, canonicalize_text

    cleaned: str = canonicalize_text(basic_clean(text))
    return cleaned


def _name(function: Callable[[str], str]) -> str:
    return getattr(function, "__name__", str(function))
