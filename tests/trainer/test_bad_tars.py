"""Samples without a usable image are left out before a run begins, counted by reason; bad tars are named at once."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import samples_of, write_tar
from tests.defective import COUNTS, DEFECTS, MAX_BYTES, write_defective, write_members
from tests.trainer.loading import load_batches, loader_of, open_run, same
from threetowers.cache.builder.build import build_cache
from threetowers.cache.builder.build_config import BuildConfig
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.tar_headers import BadTar
from threetowers.eval.datasets.dataset import load_dataset_config, open_dataset
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.encoders.embedding_store import images_digest
from threetowers.eval.tasks.settings import RetrievalSettings
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.estimate.dry_run import dry_run


@pytest.fixture(autouse=True)
def small_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threetowers.cache.webdataset.sample_list.MAX_MEMBER_BYTES", MAX_BYTES)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return write_defective(tmp_path / "x.tar")


@pytest.fixture
def run(clip: dict[str, Any], tar: Path) -> dict[str, Any]:
    """A CLIP run on the tar."""
    del clip["data"]["group_field"]
    clip["data"] |= {"tars": [str(tar)], "on_bad": "skip"}
    return clip


@pytest.fixture
def teacher(cache: Path) -> dict[str, Any]:
    return {"encoder": f"timm:test_resnet@64:{cache.parent}/teacher.safetensors"}


@pytest.fixture
def own_cache(teacher: dict[str, Any], tar: Path, tmp_path: Path) -> Path:
    """A cache of the tar."""
    build_cache(BuildConfig(tars=[tar], output_dir=tmp_path / "cache", **teacher))
    return tmp_path / "cache"


def test_defective_samples_are_left_out_up_front(run: dict[str, Any], tar: Path, tmp_path: Path) -> None:
    empty, cut = write_members(tmp_path / "none.tar"), tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:3000])
    run["data"]["tars"].append(str(empty))
    samples = open_run(run)
    assert (len(samples), samples.total, samples.left_out) == (19, 24, COUNTS)
    assert samples.notes() == [f"1 tars hold no samples: {empty}", "members that are not read: 1 .tif in samples"]
    batches = load_batches(run, stop=3)
    assert [len(batch) + len(batch.bad) for batch in batches] == [12, 12, 12]
    assert not any(batch.bad for batch in batches)
    assert "left out: 1, too large" in dry_run(parse(run))

    # Sequential access passes over them, too
    run["data"] |= {"access": "sequential", "num_streams": 2}
    in_order = loader_of(run, open_run(run), stop=1)
    assert [(len(batch), batch.bad) for batch in in_order] == [(12, ())]

    # Nothing to learn from, or too little
    for change, message in (
        ({"global_batch_size": 20}, "a batch of 20 needs at least 20 samples, the tars hold 19 that can be used .1 no"),
        (
            {"data": run["data"] | {"image_member": "gif"}},
            "none of 24 samples can be used: 24 no image; the first: ",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            open_run(run | change)

    run["data"]["on_bad"] = "error"
    for open_it in (open_run, lambda tree: dry_run(parse(tree))):
        with pytest.raises(BadSample, match=r"x\.tar: sample 's0001': no image: .* 1 not a file.* on_bad: skip"):
            open_it(run)
    run["data"] |= {"on_bad": "skip", "tars": [str(cut), str(tar), str(empty)]}
    with pytest.raises(BadTar, match=r"1 of 3 tars cannot be used: .*cut\.tar"):
        open_run(run)
    run["data"]["on_bad"] = "skip_tars"
    samples = open_run(run)
    assert (len(samples), len(samples.tars)) == (19, 1)
    assert "left out, a bad tar" in samples.notes()[0]
    run["data"]["tars"] = [str(empty)]
    with pytest.raises(BadTar, match=r"none of 1 tars can be used; the first: .*none\.tar: holds no samples"):
        open_run(run)


def test_kept_indexes_serve_any_image_member(run: dict[str, Any], tmp_path: Path) -> None:
    run["data"]["index_dir"] = str(tmp_path / "index")
    for member, counts in ((None, COUNTS), ("png", {"no image": 2, "too large": 1, "not a file": 1}), (None, COUNTS)):
        run["data"]["image_member"] = member
        samples = open_run(run)
        assert (samples.left_out, len(samples)) == (counts, 24 - sum(counts.values()))
    assert len(list((tmp_path / "index").glob("*.npz"))) == 1


def test_cached_runs_know_samples_without_an_image(
    run: dict[str, Any], three: dict[str, Any], lit: dict[str, Any], own_cache: Path
) -> None:
    for tree in (three, lit):
        tree["data"] = run["data"]
        tree["towers"]["third"] |= {"path": str(own_cache)}
    three["towers"]["third"]["on_missing_row"] = "error"
    assert open_run(three).left_out == COUNTS

    # A run that reads no image is not concerned: its cache has no rows for these samples
    lit["data"] = run["data"] | {"on_bad": "error"}
    lit["towers"]["third"]["on_missing_row"] = "skip"
    assert open_run(lit).left_out == {"no embedding in 'third'": 5}

    # The teacher cannot embed what is no image
    lit["towers"]["third"] |= {"on_missing_row": "live", "weights": str(own_cache / "no such file")}
    lit["data"]["on_bad"] = "skip"
    samples = open_run(lit)
    assert (samples.left_out, +samples.without_row) == (COUNTS, {})
    lit["data"]["on_bad"] = "error"
    with pytest.raises(BadSample, match=r"'s0001': no image: .* \(1 such samples in this tar\); .*data\.on_bad: skip"):
        open_run(lit)


def test_a_run_and_its_cache_are_of_one_image_member(
    three: dict[str, Any], teacher: dict[str, Any], tmp_path: Path
) -> None:
    pairs = [(key, {"left.png": sample["png"], **sample, "mask.png": b""}) for key, sample in samples_of(0, 12)]
    path = write_tar(tmp_path / "pairs.tar", pairs)
    build_cache(BuildConfig(tars=[path], output_dir=tmp_path / "left", image_member="left.png", **teacher))
    three["towers"]["third"]["path"] = str(tmp_path / "left")
    three["data"] |= {"tars": [str(path)], "image_member": "left.png"}
    by_member = load_batches(three, stop=1)[0]
    three["data"]["image_member"] = None
    with pytest.raises(
        ManifestError,
        match=r"image_member: the cache was built from the member 'left\.png', the images of .*pairs\.tar are the only "
        r"image of each sample \(null\); set image_member",
    ):
        open_run(three)
    three["data"] |= {"tars": [], "datasets": {"pairs": {"tars": [str(path)], "image_member": "left.png"}}}
    assert same(by_member, load_batches(three, stop=1)[0])
    assert len(by_member) == 12


def test_a_data_set_counts_samples_without_an_image(tar: Path, tmp_path: Path) -> None:
    (tmp_path / "set.yaml").write_text("name: x\ntars: [x.tar]\nimage_member: png\ntasks: {retrieval: {}}\n")
    part = open_dataset(load_dataset_config(tmp_path / "set.yaml"), "retrieval", RetrievalSettings()).test
    assert (len(part.rows), len(part.data.skipped)) == (20, 4)
    data = ImageReader().read([str(tar)])
    assert [key for key in DEFECTS if any(f"{key!r}: {DEFECTS[key]}" in line for line in data.skipped)] == list(DEFECTS)
    assert data.encoded(data.images[0]).startswith(b"\x89PNG")

    # The embeddings of another member are kept under another name
    other = ImageReader().read([str(tar)], image_member="jpg")
    assert [image.key for image in other.images] == ["s0003"]
    assert images_digest(part.data, other.images) != images_digest(other, other.images)
    (tmp_path / "cut.tar").write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"1 of 2 tars cannot be used: .*cut\.tar"):
        ImageReader().read([str(tar), str(tmp_path / "cut.tar")])
