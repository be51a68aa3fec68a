"""Which split a concept belongs to: a hash of its code points, and at most one of concepts that look alike."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

SALT = "threetowers-emoji-1"
TEST_BELOW = 0.1833  # of the hash range: gives 350 concepts
VAL_BELOW = 0.2476  # gives 120
THUMB = 32  # pixels, both sides, of the images that are compared
ALIKE_RMS = 4.0  # grey levels of 255: Norway and Bouvet Island differ by 1.0, a snowman with and without snow by 4


def position(concept: str) -> float:
    """Return the concept's place in [0, 1): a hash, so it never depends on which other concepts exist."""
    digest = hashlib.sha256(f"{SALT}:{concept}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(concept: str) -> str:
    """Return "test", "val" or "train"."""
    storage = position(concept)
    return "test" if storage < TEST_BELOW else "val" if storage < VAL_BELOW else "train"


def alike_pairs(images: Mapping[str, Image.Image]) -> list[tuple[str, str]]:
    """Return the pairs of concepts whose images, all of one style, are equal or nearly so (see ALIKE_RMS)."""
    concepts = list(images)
    thumbs = [np.asarray(images[c].resize((THUMB, THUMB), Image.Resampling.BOX), np.float64) for c in concepts]
    x = np.stack(thumbs).reshape(len(thumbs), -1)
    norms = np.einsum("nd,nd->n", x, x)
    distances = norms[:, None] + norms[None, :] - 2 * x @ x.T  # exact: all terms are integers below 2**53
    rows, columns = np.nonzero(np.triu(distances < ALIKE_RMS**2 * x.shape[1], k=1))
    return [(concepts[i], concepts[j]) for i, j in zip(rows.tolist(), columns.tolist(), strict=True)]


def groups(concepts: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Return the connected groups of concepts (union-find), each ordered by its members' positions."""
    parent = {concept: concept for concept in concepts}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            parent[concept] = concept = parent[parent[concept]]
        return concept

    for a, b in pairs:
        parent[root(a)] = root(b)
    members = defaultdict(list)
    for concept in parent:
        members[root(concept)].append(concept)
    return [sorted(group, key=position) for group in members.values()]


def plan(concepts: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the split of every concept, or "dropped".

    A concept is only ever in the split of its own hash. Where concepts look alike and one of them is held out (test
    before val), that one stays and the others are dropped; a group that is all train stays whole.
    """
    result = {}
    for group in groups(concepts, pairs):
        split = split_of(group[0])  # the smallest position: test sorts before val, val before train
        for concept in group:
            result[concept] = split if split == "train" or concept == group[0] else "dropped"
    return result
