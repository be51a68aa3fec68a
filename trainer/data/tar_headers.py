"""The index of a run's tars, made once: each rank reads the headers of its share, and all get the whole."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xxhash
from torch import distributed

from threetowers.cache.storage.storage import Storage, open_storage, split_address
from threetowers.cache.webdataset.tar_index import SampleList, TarIndex, expand, index_tar
from threetowers.cache.world import World

THREADS = 8  # remote tars wait for the network; local ones neither gain nor lose


def index_sets(
    patterns: Mapping[str, Sequence[str]], kept: str | None = None
) -> tuple[list[TarIndex], dict[str, range]]:
    """Return the indexed tars of all sets in order, and the numbers of each set's tars. Collective.

    `kept`: the folder or URL where indexes stay for the next time. Raises ValueError, BadTar or OSError, the same on
    all ranks, for a tar that cannot be found or trusted.
    """
    world = World.from_process_group()
    listed = _gathered(lambda: [expand(part) for part in patterns.values()] if world.first else [])[0]  # one listing
    locations = [location for part in listed for location in part]
    shares = _gathered(lambda: _indexed(locations[world.rank :: world.size], kept))
    tars = [shares[number % world.size][number // world.size] for number in range(len(locations))]
    ends = [sum(map(len, listed[:count])) for count in range(len(listed) + 1)]
    return tars, dict(zip(patterns, (range(*ends) for ends in pairwise(ends)), strict=True))


def _indexed(locations: Sequence[str], kept: str | None) -> list[TarIndex]:
    with ThreadPoolExecutor(THREADS) as pool:
        if kept is None:
            return list(pool.map(index_tar, locations))
        return list(pool.map(partial(kept_index, open_storage(kept)), locations))


def kept_index(folder: Storage, location: str) -> TarIndex:
    """Return the index of a tar as it is kept for a tar of this size and time, else from its headers, and keep it.

    Raises BadTar or OSError as `index_tar` does, PlaceError where nothing can be kept.
    """
    storage, name = split_address(location)
    now = {"location": location, "size": storage.size(name), "modified": storage.modified(name)}
    file = f"{xxhash.xxh3_64_hexdigest(location.encode())}.npz"
    try:
        with np.load(io.BytesIO(folder.read(file)), allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            facts = {key: about.pop(key) for key in ("fingerprint", "ignored")}
            if about == now:
                return TarIndex(location, about["size"], samples=SampleList.from_arrays(found), **facts)
    except (FileNotFoundError, EOFError, ValueError, KeyError, BadZipFile):
        pass  # not kept yet, or damaged
    index = index_tar(location)
    data = io.BytesIO()
    about = json.dumps(now | {"fingerprint": index.fingerprint, "ignored": index.ignored})
    np.savez(data, about=np.array(about), **index.samples.to_arrays())  # type: ignore[arg-type]
    folder.put(file, data.getvalue(), owner="index")
    return index


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
