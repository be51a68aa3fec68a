"""The last step of a tower, taken out of it, so that one pass gives what is before it and after it."""

from torch import Tensor, nn


class Projection(nn.Module):
    """A map to the joint space: a matrix, a module, or nothing."""

    def __init__(self, projection: nn.Parameter | nn.Module | None) -> None:
        super().__init__()
        self.matrix = projection if isinstance(projection, nn.Parameter) else None
        self.module = projection if isinstance(projection, nn.Module) else None

    def forward(self, x_bD: Tensor) -> Tensor:
        """Return the projected vectors."""
        if self.matrix is not None:
            return x_bD @ self.matrix
        if self.module is not None:
            projected_bD: Tensor = self.module(x_bD)
            return projected_bD
        return x_bD
