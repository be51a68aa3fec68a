"""Text towers that begin with the weights of a run: whether the ids of its tokens mean the same words."""

from collections.abc import Iterator

from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.model.initial.initial_weights import RUN, run_and_part
from threetowers.trainer.run.finished_run import finished_run_folder


def other_vocabularies(config: TrainConfig, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield a warning for each text tower that begins with the weights of a run on another tokenizer than this run's.

    Vocabularies of one size fit as tensors, though the rows of the token embedding are of other words.
    """
    for name, tower in config.towers.items():
        if tokenizer is None or isinstance(tower, CacheTower) or tower.reads != "tokens":
            continue
        if not (tower.init or "").startswith(RUN):
            continue
        source = finished_run_folder(run_and_part(str(tower.init).removeprefix(RUN))[0])
        try:
            source.check_tokenizer(tokenizer)
        except ConfigError:
            yield (
                f"warning: towers.{name}.init: {source} was trained on another tokenizer than {tokenizer.name}: "
                "the ids of its token embedding mean other words"
            )
