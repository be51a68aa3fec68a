"""The indexes of a run's tars: each rank reads the headers of its share of the tars, and all get all indexes."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import xxhash
from torch import distributed

from threetowers.cache.processes.world import World
from threetowers.cache.storage.storage import Storage, open_storage, split_address
from threetowers.cache.webdataset.sample_list import SampleList
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.cache.webdataset.tar_index import TarIndex, index_tar
from threetowers.cache.webdataset.tar_list import OnBad, require_samples, select_tars, try_index
from threetowers.cache.webdataset.tar_patterns import expand

INDEX_FORMAT = 2  # of the files in `index_dir`
THREADS = 8  # remote tars wait for the network; local ones neither gain nor lose


class IndexedDatasets(NamedTuple):
    """The tars of all data sets.

    Attributes:
        tars: Those that are used, in order.
        tar_numbers: The numbers of each data set's tars in that list.
        notes: Lines on tars that are not used.
    """

    tars: list[TarIndex]
    tar_numbers: dict[str, range]
    notes: list[str]


def index_datasets(
    patterns: Mapping[str, Sequence[str]],
    index_dir: str | None = None,
    *,
    image_members: Mapping[str, str | None] | None = None,
    on_bad: OnBad = "error",
) -> IndexedDatasets:
    """Index the tars of all data sets. Collective: an error on one rank is raised on all.

    Args:
        patterns: Paths, globs, brace ranges or URLs of the tars, by data set.
        index_dir: Folder or URL where indexes are kept for the next launch; None keeps none.
        image_members: The extension of the images of each data set; None where it is each sample's only image.
        on_bad: Whether bad tars are left out (`skip_tars`).

    Raises:
        BadTar: Tars are damaged, and are all named; or a data set has no tar with a sample.
        OSError: A tar cannot be read, or an index cannot be kept.
        ValueError: A pattern matches no file.
    """
    world = World.from_process_group()

    # One listing for all ranks, which may see a shared file system differently
    (listed, *_) = gather_from_ranks(lambda: [expand(tars) for tars in patterns.values()] if world.first else [])
    wanted = []
    for name, locations in zip(patterns, listed, strict=True):
        wanted += [(location, (image_members or {}).get(name)) for location in locations]

    # Rank r of W indexes the tars r, r + W, r + 2 W, ...
    by_rank = gather_from_ranks(lambda: _index_tars(wanted[world.rank :: world.size], index_dir))
    found = [by_rank[number % world.size][number // world.size] for number in range(len(wanted))]

    # All bad tars of all data sets are named at once
    notes = select_tars(found, on_bad).notes()
    tars: list[TarIndex] = []
    tar_numbers = {}
    first = 0
    for name, locations in zip(patterns, listed, strict=True):
        usable = require_samples(select_tars(found[first : first + len(locations)], on_bad)).tars
        tar_numbers[name] = range(len(tars), len(tars) + len(usable))
        tars += usable
        first += len(locations)
    return IndexedDatasets(tars, tar_numbers, notes)


def _index_tars(wanted: Sequence[tuple[str, str | None]], index_dir: str | None) -> list[TarIndex | BadTar]:
    def index(tar: tuple[str, str | None]) -> TarIndex | BadTar:
        if index_dir is None:
            return try_index(*tar)
        try:
            return _kept_index(open_storage(index_dir), *tar)
        except BadTar as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(index, wanted))


def _kept_index(folder: Storage, location: str, image_member: str | None) -> TarIndex:
    """Return the index of a tar: the one kept for a tar of this size and time, else a new one, which is then kept.

    What is kept does not depend on which member is the image.
    """
    storage, name = split_address(location)
    tar = {
        "format": INDEX_FORMAT,
        "location": location,
        "size": storage.size(name),
        "modified": storage.modified(name),
    }
    file = f"{xxhash.xxh3_64_hexdigest(location.encode())}.npz"
    try:
        with np.load(io.BytesIO(folder.read(file)), allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            fingerprint = about.pop("fingerprint")
            ignored = about.pop("ignored")
            if about == tar:
                samples = SampleList.from_arrays(kept, image_member)
                return TarIndex(location, about["size"], samples=samples, fingerprint=fingerprint, ignored=ignored)
    except (FileNotFoundError, EOFError, ValueError, KeyError, BadZipFile):
        pass  # not kept yet, or damaged
    index = index_tar(location, image_member=image_member)
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
