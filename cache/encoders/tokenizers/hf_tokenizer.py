"""Fast tokenizers of transformers: a `tokenizer.json`, or a folder that holds one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from threetowers.cache.encoders.huggingface.loading import ModelFiles, require
from threetowers.cache.encoders.huggingface.tokenizer import load_tokenizer, tokenizer_digest, tokens_of
from threetowers.cache.encoders.names import EncoderName
from threetowers.cache.encoders.packaged_weights import PACKAGE, packaged_sentence_encoder
from threetowers.cache.encoders.tokenizers.tokenizer import MissingTokenizer, SpecialTokens, Tokenizer, Tokens
from threetowers.cache.encoders.weights_file import one_line

KIND = "hf"
FOLDER = "tokenizer"  # of a run folder
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
# What a tokenizer.json alone does not say: which of its special tokens ends a caption, and which one pads.
KNOWN_TOKENS = {
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>"),
    "sep_token": ("[SEP]",),
    "pad_token": ("<pad>", "[PAD]", "<|pad|>"),
}


class HfTokenizer(Tokenizer):
    """A fast tokenizer of transformers, which puts around a caption what its file says.

    Where that is no end token, one is put behind it: a text tower reads there what a caption means.
    """

    packages = ("transformers", "tokenizers")

    def __init__(self, tokenizer: Any, name: str) -> None:
        """Use a tokenizer of transformers; `name` is for messages.

        Raises:
            ValueError: It is not a fast one, or none of its tokens ends a caption.
        """
        self.name = name
        self._tokenizer = tokenizer
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"{name}: found {type(tokenizer).__name__}, expected a fast tokenizer, with a {FILE}")
        ends = [i for i in (tokenizer.eos_token_id, tokenizer.sep_token_id) if i is not None]
        first, second = (list(row.ids) for row in tokens_of(tokenizer, ["", "a b"], 512))
        ended = [i for i in ends if first[-1:] == second[-1:] == [i]]
        if not ends:
            raise ValueError(
                f"{name}: found no end token, expected an eos_token or a sep_token: name it in {CONFIG} beside {FILE}"
            )
        end = (ended or ends)[0]
        pad = tokenizer.pad_token_id
        starts = (tokenizer.bos_token_id, tokenizer.cls_token_id)
        start = next((i for i in starts if i is not None and first[:1] == second[:1] == [i] and i != end), None)
        self._added = [] if ended else [end]
        self._special = SpecialTokens(end, end if pad is None else pad, start, tokenizer.unk_token_id)

    @property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return self._special

    @property
    def vocab_size(self) -> int:
        """The largest id of a token, plus one."""
        return 1 + int(max(self._tokenizer.get_vocab().values()))

    @property
    def digest(self) -> str:
        """The sha256 of the serialised tokenizer, the same as in caches of text encoders."""
        return tokenizer_digest(self._tokenizer)

    def files(self) -> Mapping[str, bytes]:
        """Return a folder of transformers, of the tokenizer as it is now."""
        state = json.loads(self._tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        roles = {role: getattr(self._tokenizer, role) for role in ROLES}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": self._tokenizer.truncation_side,
            **{role: token for role, token in roles.items() if token is not None},
        }
        return {
            f"{FOLDER}/{FILE}": json.dumps(state, ensure_ascii=False).encode(),
            f"{FOLDER}/{CONFIG}": json.dumps(config, ensure_ascii=False, indent=2).encode(),
        }

    def tokenize(self, texts: Sequence[str], max_length: int) -> list[Tokens]:
        """Return the tokens of each text, cut as the tokenizer does it."""
        rows = tokens_of(self._tokenizer, list(texts), max_length - len(self._added))
        return [Tokens([*row.ids, *self._added], row.cut) for row in rows] if self._added else rows


def load_hf_tokenizer(source: str) -> HfTokenizer:
    """Load a tokenizer.

    Args:
        source: A folder with a `tokenizer.json`, such a file, a name on the hub, or `package:NAME` for that of a model
            inside a pip package.

    Raises:
        MissingTokenizer: There is no such file, folder or package.
        ValueError: transformers is not installed, or what is there cannot be loaded.
    """
    require("transformers", KIND, KIND)
    name = f"{KIND}:{source}"
    if source.startswith(PACKAGE):
        try:
            source = str(packaged_sentence_encoder(source.removeprefix(PACKAGE)))
        except ValueError as error:
            raise MissingTokenizer(f"{name}: {error}") from error
    path = Path(source)
    if path.is_file() and not (path.name == FILE and (path.parent / CONFIG).is_file()):
        return HfTokenizer(_of_file(path, name), name)
    folder = str(path.parent) if path.is_file() else source
    if not path.exists() and (source.startswith((".", "/", "~")) or source.endswith(".json")):
        raise MissingTokenizer(f"{name}: no such file or folder; name a {FILE}, or a folder that holds one")
    return HfTokenizer(load_tokenizer(ModelFiles.of(EncoderName(KIND, folder))), name)


def _of_file(path: Path, name: str) -> Any:
    """Return the tokenizer of a file alone; which of its tokens are special for us is known by their names."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{name}: expected a {FILE} of tokenizers, found another file: {one_line(error)}") from error
    roles = {
        role: next((token for token in tokens if backend.token_to_id(token) is not None), None)
        for role, tokens in KNOWN_TOKENS.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{role: token for role, token in roles.items() if token is not None}
    )
