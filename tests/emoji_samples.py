"""A small part of the emoji tars, in the folders where the demo has them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import write_tar
from threetowers.cache.webdataset.tar_index import index_tar, read_member

ROOT = Path(__file__).parent.parent


def demo_folder(folder: Path, counts: Mapping[str, int]) -> Path:
    """Put configs/ and one tar of the first samples of each split into a folder, as a checkout has them.

    Args:
        folder: Where to.
        counts: Samples by split: train, val, test.
    """
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "data/emoji").mkdir(parents=True)
    for split, count in counts.items():
        tar = index_tar(sorted((ROOT / "data/emoji").glob(f"{split}-*.tar"))[0])
        members = [
            (sample.key, {name: read_member(tar, ordinal, name) for name in sample.members})
            for ordinal, sample in enumerate(list(tar.samples)[:count])
        ]
        write_tar(folder / f"data/emoji/{split}-0.tar", members)
    return folder
