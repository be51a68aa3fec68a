"""Whether the text towers of a run read the tokens of its tokenizer as they are meant."""

from collections.abc import Iterator

from threetowers.cache.encoders.openclip.model_config import OpenClipConfig, read_open_clip_config
from threetowers.cache.encoders.tokenizers.tokenizer import SpecialTokens, Tokenizer
from threetowers.trainer.config import ConfigError, OpenClipTower, TrainConfig


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raise ConfigError, with all reasons, where a tower would take the tokens for something else.

    Our own text towers take any tokenizer; those of open_clip know the end of a caption, and the padding behind it, by
    ids of their own.
    """
    problems = []
    for name, tower in config.towers.items():
        if isinstance(tower, OpenClipTower) and tower.of == "text":
            found = read_open_clip_config(tower.model, tower.args)
            ids = tokenizer.vocab_size
            problems += [f"towers.{name}: {reason}" for reason in _misread(found, tokenizer.special, ids)]
    if problems:
        raise ConfigError(
            f"data.tokenizer: {tokenizer.name} does not fit the model: {'; '.join(problems)}; name the tokenizer of "
            "the model, as open_clip:NAME, or set the keys named in its args"
        )


def _misread(config: OpenClipConfig, special: SpecialTokens, ids: int) -> Iterator[str]:
    """Yield what a text tower of open_clip would misread of the tokens of a tokenizer with so many ids."""
    text = config.text
    if text.get("hf_model_name"):
        from transformers import AutoConfig

        padding = AutoConfig.from_pretrained(text["hf_model_name"]).pad_token_id
        if special.pad != padding:
            yield f"it masks the token {padding} as padding, the tokenizer pads with {special.pad}"
        return
    if config.pooling == "argmax" and special.end != ids - 1:
        yield (
            f"it takes the largest id for the end of a caption, the tokenizer ends it with {special.end} of {ids:,} "
            f"(args: text_cfg: pool_type: eos, eos_id: {special.end})"
        )
    if config.pooling == "eos" and special.end != text.get("eos_id", 2):
        yield (
            f"a caption ends with {text.get('eos_id', 2)} (text_cfg.eos_id), the tokenizer ends it with {special.end}"
        )
    if config.pooling == "cls_emb" and special.pad != text.get("pad_id", 0):
        yield f"it masks {text.get('pad_id', 0)} as padding (text_cfg.pad_id), the tokenizer pads with {special.pad}"
