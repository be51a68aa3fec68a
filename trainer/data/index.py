"""The index of a run's tars, made once: each rank reads the headers of its share, and all get the whole."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

from torch import distributed

from threetowers.cache.tars import TarIndex, expand, index_tar

THREADS = 8  # remote tars wait for the network; local ones neither gain nor lose


def index_sets(patterns: Mapping[str, Sequence[str]]) -> tuple[list[TarIndex], dict[str, range]]:
    """Return the indexed tars of all sets in order, and the numbers of each set's tars. Collective.

    Raises ValueError, BadTar or OSError, the same on all ranks, for a tar that cannot be found or trusted.
    """
    together = distributed.is_initialized()
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)
    listed = _gathered(lambda: [expand(part) for part in patterns.values()] if rank == 0 else [])[0]  # one listing
    locations = [location for part in listed for location in part]
    shares = _gathered(lambda: _indexed(locations[rank::ranks]))
    tars = [shares[number % ranks][number // ranks] for number in range(len(locations))]
    ends = [sum(map(len, listed[:count])) for count in range(len(listed) + 1)]
    return tars, dict(zip(patterns, (range(*ends) for ends in pairwise(ends)), strict=True))


def _indexed(locations: Sequence[str]) -> list[TarIndex]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(index_tar, locations))


def _gathered(make: Callable[[], Any]) -> list[Any]:
    """What each rank makes; an error of one is raised on all."""
    made: Any
    try:
        made = make()
    except (OSError, ValueError) as error:
        made = error
    every = [made]
    if distributed.is_initialized():
        every = [None] * distributed.get_world_size()
        distributed.all_gather_object(every, made)
    for one in every:
        if isinstance(one, Exception):
            raise one
    return every
