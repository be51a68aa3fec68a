"""Requirements of the features that probes are fitted to."""

import numpy as np

from threetowers.eval.metrics.classification import Floats

DEVIATION_EPSILON = 1e-5  # added to a standard deviation, so that a constant feature can be standardised


def check_finite(train_ND: Floats) -> None:
    """Check the training features of a probe.

    Raises:
        ValueError: For a feature that is NaN or infinite.
    """
    finite_N = np.isfinite(train_ND).all(axis=1)
    if not finite_N.all():
        row = int((~finite_N).argmax())
        raise ValueError(f"the features of training item {row} hold NaN or infinity: find what produced them")
