"""What models of transformers give: the states of tokens, the model's own vector, the joint space."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class ModuleOutput:
    """The output of a module.

    Attributes:
        states: Of the tokens, (b, L, D), or a feature map (b, D, h, w).
        pooler: A model's own vector, (b, D); None without one.
    """

    states: Any = None
    pooler: Tensor | None = None


@contextlib.contextmanager
def captured_output(module: nn.Module) -> Iterator[ModuleOutput]:
    """Keep what a module gives while it runs inside a model: the model above it may write over it."""
    kept = ModuleOutput()

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            kept.states, kept.pooler = output.last_hidden_state, getattr(output, "pooler_output", None)
        else:
            kept.states = output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def own_pooler(tower: Any) -> bool:
    """Return whether a model's own vector is the one that it was trained by.

    BERT's and ViT's poolers, a dense layer and a tanh, were trained for another task, or never.
    """
    return not hasattr(getattr(tower, "pooler", None), "dense")


def joint_embedding(output: Any, of_pair: bool, name: str) -> Tensor | None:
    """Return the joint-space embedding (b, D) in the output of a model; None where it has none.

    Args:
        output: Of `get_text_features` or `get_image_features`, or of a model of one side.
        of_pair: Whether it is of one of the two functions.
        name: Of the embedding in the output of a model of one side.
    """
    if of_pair:
        embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embedding
    return getattr(output, name, None)
