"""What models of transformers give: the states of tokens, the model's own vector, the joint space."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class TowerOutput(NamedTuple):
    """The output of one side of a model.

    Attributes:
        states: Of the tokens, (b, L, D), or a feature map (b, D, h, w).
        pooler: The model's own vector; None without one.
    """

    states: Tensor
    pooler: Tensor | None


class TowerHook:
    """Keeps what one side of a model gives in a forward pass, before the model above it writes over it."""

    def __init__(self, tower: nn.Module, name: str) -> None:
        """Keep the output of `tower`. `name`: of the encoder, for messages."""
        self._name = name
        self._found: TowerOutput | None = None
        tower.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        self._found = None if states is None else TowerOutput(states, getattr(output, "pooler_output", None))

    def take(self) -> TowerOutput:
        """Return the output of the last forward pass, and forget it.

        Raises:
            ValueError: The model is put together in another way.
        """
        found, self._found = self._found, None
        if found is None:
            raise ValueError(
                f"{self._name}: expected a model that gives last_hidden_state, or whose sides text_model and "
                "vision_model do, found another: it cannot be used as an encoder"
            )
        return found


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
