"""How the samples of tars are named where an import looks for them: by their key, its last part, or a field."""

from functools import partial
from typing import Literal

import numpy as np

from threetowers.cache.exchange.import_source import Hashes
from threetowers.cache.storage.object_file import open_object
from threetowers.cache.webdataset.sample import read_fields
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash, read_member_of

Match = Literal["key", "name", "uid"]
UID = "uid"  # the field that names a sample of DataComp, in which tar and at which place it may lie
NO_UID = ""  # is the key of no sample


def key_hashes(index: TarIndex, match: Match) -> Hashes:
    """Return the (n,) hash by which each sample of a tar is looked for.

    Raises:
        BadTar: The tar has changed since it was indexed.
    """
    if match == "uid":
        return np.array([key_hash(uid) for uid in _uids(index)], np.uint64)
    keys = (index.samples.key(ordinal) for ordinal in range(len(index.samples)))
    return np.array([key_hash(key if match == "key" else sample_name(key)) for key in keys], np.uint64)


def sample_name(key: str) -> str:
    """Return the last part of a key, or of the path of a file, up to its first dot.

    Examples:
        >>> sample_name("/data/00012/000120007.jpg"), sample_name("part/000120007")
        ('000120007', '000120007')
    """
    return key.replace("\\", "/").rpartition("/")[2].partition(".")[0]


def _uids(index: TarIndex) -> list[str]:
    found = []
    with open_object(index.location) as file:
        for ordinal in range(len(index.samples)):
            fields, _ = read_fields(index, ordinal, partial(read_member_of, file, index, ordinal))
            uid = fields.get(UID)
            found.append(uid if isinstance(uid, str) else NO_UID)
    return found
