"""Text towers that begin with weights of others: whether the ids of its tokens mean the same words."""

from collections.abc import Iterator

from threetowers.cache.encoders.packaged_weights import PACKAGE
from threetowers.cache.encoders.tokenizers.hf_tokenizer import load_hf_tokenizer
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.trainer.config import CacheTower, ConfigError, HfTower, TrainConfig
from threetowers.trainer.model.initial.initial_weights import RUN, run_and_part
from threetowers.trainer.run.finished_run import finished_run_folder


def other_vocabularies(config: TrainConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield a warning for each text tower that begins with weights that were trained on another tokenizer.

    They are those of a run, or of a model of transformers whose files have their tokenizer. Vocabularies of one size
    fit as tensors, though the rows of the token embedding are of other words.
    """
    for name, tower in config.towers.items():
        if tokenizer is None or isinstance(tower, CacheTower) or tower.reads != "tokens" or tower.init is None:
            continue
        source = _other_source(tower.init, tower.model if isinstance(tower, HfTower) else None, tokenizer)
        if source is not None:
            yield (
                f"warning: towers.{name}.init: {source} was trained on another tokenizer than {tokenizer.name}: "
                "the ids of its token embedding mean other words"
            )


def _other_source(init: str, model: str | None, tokenizer: Tokenizer) -> str | None:
    """Return what was trained on another tokenizer; None where it was this one, or is unknown.

    Args:
        init: Of a tower.
        model: Of transformers, if the tower is one with files.
        tokenizer: Of this run.
    """
    if init.startswith(RUN):
        folder = finished_run_folder(run_and_part(init.removeprefix(RUN))[0])
        try:
            folder.check_tokenizer(tokenizer)
        except ConfigError:
            return str(folder)
        return None
    files = init if init.startswith(PACKAGE) else model if init == "pretrained" else None
    if files is None:
        return None
    try:
        own = load_hf_tokenizer(files)
    except ValueError:  # the files have none, or none that ends a caption
        return None
    return files if own.digest != tokenizer.digest else None
