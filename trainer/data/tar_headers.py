"""The indexes of a run's tars: each rank reads the headers of its share of the tars, and all get all indexes."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from zipfile import BadZipFile

import numpy as np
import xxhash
from torch import distributed

from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import Storage, open_storage, split_address
from threetowers.cache.webdataset.tar_index import SampleList, TarIndex, expand, index_tar

THREADS = 8  # remote tars wait for the network; local ones neither gain nor lose


def index_datasets(
    patterns: Mapping[str, Sequence[str]], index_dir: str | None = None
) -> tuple[list[TarIndex], dict[str, range]]:
    """Return the indexed tars of all data sets in order, and the numbers of each data set's tars. Collective.

    An error on one rank is raised on all.

    Args:
        patterns: Paths, globs, brace ranges or URLs of the tars, by data set.
        index_dir: Folder or URL where indexes are kept for the next launch; None keeps none.

    Raises:
        BadTar: A tar is damaged.
        OSError: A tar cannot be read, or an index cannot be kept.
        ValueError: A pattern matches no file.
    """
    world = World.from_process_group()

    # One listing for all ranks, which may see a shared file system differently
    (listed, *_) = gather_from_ranks(lambda: [expand(tars) for tars in patterns.values()] if world.first else [])
    locations = [location for tars in listed for location in tars]

    # Rank r of W indexes the tars r, r + W, r + 2 W, ...
    by_rank = gather_from_ranks(lambda: _index_tars(locations[world.rank :: world.size], index_dir))
    tars = [by_rank[number % world.size][number // world.size] for number in range(len(locations))]

    tar_numbers = {}
    first = 0
    for name, of_dataset in zip(patterns, listed, strict=True):
        tar_numbers[name] = range(first, first + len(of_dataset))
        first += len(of_dataset)
    return tars, tar_numbers


def _index_tars(locations: Sequence[str], index_dir: str | None) -> list[TarIndex]:
    with ThreadPoolExecutor(THREADS) as pool:
        if index_dir is None:
            return list(pool.map(index_tar, locations))
        return list(pool.map(partial(_kept_index, open_storage(index_dir)), locations))


def _kept_index(folder: Storage, location: str) -> TarIndex:
    """Return the index of a tar: the one kept for a tar of this size and time, else a new one, which is then kept."""
    storage, name = split_address(location)
    tar = {"location": location, "size": storage.size(name), "modified": storage.modified(name)}
    file = f"{xxhash.xxh3_64_hexdigest(location.encode())}.npz"
    try:
        with np.load(io.BytesIO(folder.read(file)), allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            fingerprint = about.pop("fingerprint")
            ignored = about.pop("ignored")
            if about == tar:
                samples = SampleList.from_arrays(kept)
                return TarIndex(location, about["size"], samples=samples, fingerprint=fingerprint, ignored=ignored)
    except (FileNotFoundError, EOFError, ValueError, KeyError, BadZipFile):
        pass  # not kept yet, or damaged
    index = index_tar(location)
    about = json.dumps(tar | {"fingerprint": index.fingerprint, "ignored": index.ignored})
    data = io.BytesIO()
    np.savez(data, about=np.array(about), **index.samples.to_arrays())  # type: ignore[arg-type]
    folder.put(file, data.getvalue(), owner="index")
    return index


def gather_from_ranks(compute: Callable[[], Any]) -> list[Any]:
    """Return what each rank computes, in their order. An error on one of them is raised on all. Collective."""
    result: Any
    try:
        result = compute()
    except (OSError, ValueError) as error:
        result = error
    results = [result]
    if distributed.is_initialized():
        results = [None] * distributed.get_world_size()
        distributed.all_gather_object(results, result)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results
