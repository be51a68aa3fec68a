"""Random embeddings and features for the tests of metrics."""

import numpy as np


def unit_vectors(rows: int, width: int, seed: int) -> np.ndarray:
    """Return unit-norm vectors in random directions, float32."""
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def gaussian_classes(
    classes: int, width: int, each: int, seed: int = 0, spread: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
    """Return items of Gaussian classes, away from the origin, some features a thousand times larger than others."""
    centers = spread * np.random.default_rng(0).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(classes), each))
    x = (centers[label] + rng.normal(size=(len(label), width)) + 3) * np.logspace(-1, 2, width)
    return x.astype(np.float32), label
