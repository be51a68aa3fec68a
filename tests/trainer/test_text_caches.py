"""Cached text towers in training: the caption that is drawn is one, in its words and in the rows of every cache."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import write_tar
from tests.trainer.launches import (
    RUN_CONFIGS,
    losses,
    metric,
    run_command,
    run_jobs,
    same_weights,
    torchrun,
    write_config,
)
from tests.trainer.loading import load_batches, open_run
from tests.trainer.text_runs import (
    SOURCES,
    Samples,
    build_images,
    build_text,
    captioned,
    lift,
    run_of,
    sharelock,
    three_text,
    towers_of,
    write_tars,
)
from threetowers.cache.encoders.live import embed_captions
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.format.manifest import ManifestError
from threetowers.cache.webdataset.captions import DEFAULT_CAPTIONS
from threetowers.cache.webdataset.defects import BadSample
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data.annotation_survey import survey_annotations
from threetowers.trainer.data.joins.text_join import TextJoin
from threetowers.trainer.data.joins.visit import Visit
from threetowers.trainer.data.loader import TrainingSampleReader
from threetowers.trainer.data.streaming import StreamSegment, read_segment
from threetowers.trainer.estimate.dry_run import dry_run
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.model import TowerModel

WEIGHTS = {"json.alt": 3.0, "txt": 1.0}
SHORT = {"duration": {"steps": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text-caches")


@pytest.fixture(scope="module")
def own_tars(folder: Path) -> list[Path]:
    return write_tars(folder / "tars")


@pytest.fixture(scope="module")
def text(folder: Path, own_tars: list[Path]) -> Path:
    return build_text(folder, own_tars)


@pytest.fixture(scope="module")
def images(folder: Path, own_tars: list[Path]) -> Path:
    return build_images(folder, own_tars)


@pytest.fixture
def run(clip: dict[str, Any], own_tars: list[Path]) -> dict[str, Any]:
    return run_of(clip, own_tars, WEIGHTS)


def reader_of(tree: dict[str, Any]) -> TrainingSampleReader:
    return TrainingSampleReader(parse(tree), open_run(tree))


def drawn(seed: int, epoch: int, index: int, weights: dict[str, float]) -> str:
    """The caption of one of the tars' samples, by the plainest reading of what a draw is."""
    members = captioned(index, 1)[0][1]
    found = {"txt": [members["txt"].decode()], "json.alt": json.loads(members["json"]).get("alt", [])}
    rng = np.random.default_rng([seed, epoch, index])
    candidates = [source for source in sorted(weights) if found[source]]
    source = candidates[0]
    if len(candidates) == 2:
        share = weights[candidates[0]] / sum(weights.values())
        source = candidates[0] if rng.random() < share else candidates[1]
    return found[source][rng.integers(len(found[source]))]


def embedded(caption: str) -> np.ndarray:
    """The caption's row as float16 stores it."""
    return embed_captions(load_frozen_encoder("test:bag").side("text"), [caption], "pooled")[0].astype(np.float16)


def assert_is_row(row: Any, caption: str) -> None:
    """Check the rows of a sample with one caption."""
    np.testing.assert_allclose(row, embedded(caption).astype(np.float32)[None], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("words", [True, False])
def test_rows_are_those_of_the_caption_that_a_run_without_them_draws(
    run: dict[str, Any], text: Path, folder: Path, own_tars: list[Path], words: bool
) -> None:
    """Two caches, of which the second has the sources in another order, and as int8."""
    other = folder / "other"
    if not other.exists():
        build_text(folder, own_tars, "other", sources=SOURCES[::-1], dtype="float32")
    tree = run if words else lift(run, text)
    tree = tree | {"towers": tree["towers"] | towers_of(text_a=text, text_b=other)}
    tree["heads"] = run["heads"] | {"a": {"of": "text_a"}, "b": {"of": "text_b"}}
    if not words:
        del tree["towers"]["text"]
        tree["heads"]["g"] = {"of": "text_a"}
    tree["terms"] = run["terms"] | {"a": {"x": "f", "y": "a"}, "b": {"x": "f", "y": "b"}}
    reader, plain = reader_of(tree), reader_of(run)
    seen = set()
    for epoch in range(4):
        for index in range(45):
            sample = reader.read(epoch, index)
            caption = drawn(0, epoch, index, WEIGHTS)
            seen.add(caption)
            assert plain.read(epoch, index).captions == (caption,)
            assert sample.captions == ((caption,) if words else None)
            for tower in ("text_a", "text_b"):
                assert_is_row(sample.rows[tower], caption)
    assert len(seen) > 70  # of 90


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63])
def test_the_random_numbers_of_a_visit_are_those_of_its_fields(seed: int) -> None:
    visit = Visit(seed, 3, 2**31, 0, DEFAULT_CAPTIONS)
    assert visit.rng().random(4).tolist() == np.random.default_rng([seed, 3, 2**31]).random(4).tolist()


def test_random_crops_do_not_depend_on_who_counts_the_captions(run: dict[str, Any], text: Path) -> None:
    run["data"] |= {"crop_scale": 0.4, "augment": {"flip": 0.5}}
    plain, cached = reader_of(run), reader_of(lift(run, text))
    for index in range(45):
        one, other = plain.read(1, index).image, cached.read(1, index).image
        assert one is not None
        assert other is not None
        assert one.equal(other)


@pytest.mark.parametrize("kind", ["3t-text", "lift", "sharelock"])
def test_sequential_and_random_access_give_the_same_rows(
    run: dict[str, Any], text: Path, images: Path, kind: str
) -> None:
    tree = {"3t-text": three_text(run, text), "lift": lift(run, text), "sharelock": sharelock(run, images, text)}[kind]
    samples = open_run(tree)
    reader = TrainingSampleReader(parse(tree), samples)
    segment = StreamSegment(2, samples.epoch_indices(2), 0)
    streamed = list(read_segment(samples, segment, 4, np.random.default_rng(0), read_ahead=8))
    assert sorted(found.visit.index for found in streamed) == list(range(45))
    for found in streamed:
        sample = reader.prepare(found.visit, found.members.__getitem__, found.rows.__getitem__)
        expected = reader.read(2, found.visit.index)
        assert (sample.captions, sample.group) == (expected.captions, expected.group)
        for tower, row in sample.rows.items():
            assert np.array_equal(row, expected.rows[tower]), tower  # type: ignore[arg-type]


def test_no_word_is_read_where_no_tower_needs_one(
    run: dict[str, Any], text: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(tar: Any, ordinal: int, extension: str) -> bytes:
        read.append(extension)
        return read_member(tar, ordinal, extension)

    from threetowers.trainer.data import loader

    read_member = loader.read_member
    monkeypatch.setattr(loader, "read_member", reading)
    tree = sharelock(run, images, text)
    reader_of(tree).read(0, 3)
    assert read == []
    tree["data"]["group_field"] = "concept"
    reader_of(tree).read(0, 3)
    assert read == ["json"]
    reader_of(lift(run, text)).read(0, 3)
    assert sorted(read) == ["json", "json", "png"]


def changed(samples: Samples, ordinal: int, change: str) -> Samples:
    """The samples with a change to the captions of one."""
    fields = json.loads(samples[ordinal][1]["json"])
    alt = fields["alt"]
    match change:
        case "changed":
            alt[0] = alt[0][:-1] + "!"
        case "moved":
            alt.reverse()
        case "added":
            alt.append("one more")
        case "removed":
            alt.pop()
    samples[ordinal][1]["json"] = json.dumps(fields).encode()
    return samples


@pytest.mark.parametrize("change", ["changed", "moved", "added", "removed"])
def test_captions_that_are_not_those_that_were_embedded_are_one_error(
    run: dict[str, Any], tmp_path: Path, change: str
) -> None:
    tar = write_tar(tmp_path / "now.tar", changed(captioned(0, 25), 5, change))
    text = build_text(tmp_path, [tar], before=[write_tar(tmp_path / "before.tar", captioned(0, 25))])
    tree = three_text(run | {"data": run["data"] | {"tars": [str(tar)]}}, text)
    with pytest.raises(ManifestError, match=rf"'s0005'.*: caption \d \(.*\) was {change}: "):
        reader_of(tree).read(0, 5)


def test_what_a_run_draws_must_be_what_was_embedded(run: dict[str, Any], text: Path, images: Path) -> None:
    tree = lift(run, text)
    tree["data"] |= {"captions": {"txt": 1.0}}
    open_run(tree)  # some of the sources
    tree["data"] |= {"captions": {"json.caption": 1.0}}
    with pytest.raises(ManifestError, match=r"data\.captions draws from \['json\.caption'\].*found \['txt'"):
        open_run(tree)
    tree["data"] |= {"captions": {}}
    with pytest.raises(ManifestError, match=r"data\.captions draws from the default sources, expected .* --captions"):
        open_run(tree)
    tree["data"] |= {"captions": WEIGHTS, "caption_per_line": True}
    with pytest.raises(ManifestError, match=r"data\.caption_per_line: expected that of the cache, false, found true"):
        open_run(tree)
    with pytest.raises(ManifestError, match=r"of: the tower expects a cache of text, found one of image .*`of: image`"):
        open_run(lift(run, images))
    tree = sharelock(run, text, text)
    with pytest.raises(ManifestError, match=r"of: the tower expects a cache of image, found one of text .*`of: text`"):
        open_run(tree)


def test_caches_that_hold_different_captions_are_refused(run: dict[str, Any], tmp_path: Path) -> None:
    samples = captioned(0, 25)
    tar = write_tar(tmp_path / "now.tar", changed(samples, 5, "changed"))
    one = build_text(tmp_path, [tar], "one", before=[write_tar(tmp_path / "before.tar", captioned(0, 25))])
    two = build_text(tmp_path, [tar], "two")
    tree = sharelock(run, build_images(tmp_path, [tar]), one)
    tree["data"] |= {"tars": [str(tar)], "captions": {"json.alt": 1.0}}
    tree["towers"] |= towers_of(text_b=two)
    tree["heads"] = tree["heads"] | {"b": {"of": "text_b"}}
    tree["terms"] = run["terms"] | {"b": {"x": "f", "y": "b"}}
    reader = reader_of(tree)
    epochs = [epoch for epoch in range(8) if drawn(0, epoch, 5, {"json.alt": 1.0}).startswith("disc")]
    with pytest.raises(ManifestError, match="towers 'text' and 'text_b' hold different captions"):
        reader.read(epochs[0], 5)


@pytest.fixture(scope="module")
def gap(folder: Path, own_tars: list[Path]) -> Path:
    """A cache without rows of the samples 3 and 6 of each tar."""
    return build_text(folder, own_tars, "gap", left_out=(3, 6))


def with_policy(tree: dict[str, Any], policy: str) -> dict[str, Any]:
    for tower in tree["towers"].values():
        if tower.get("of") == "text":
            tower["on_missing_row"] = policy
    return tree


@pytest.mark.parametrize("policy", ["error", "skip", "mask", "live"])
def test_samples_without_a_row(run: dict[str, Any], gap: Path, policy: str) -> None:
    tree = with_policy(three_text(run, gap), policy)
    if policy == "error":
        with pytest.raises(BadSample, match=r"'s0003': the cache of tower 'text_third' has no embedding.*\(2 such"):
            open_run(tree)
        return
    samples = open_run(tree)
    reader = TrainingSampleReader(parse(tree), samples)
    missing = [3, 6, 28, 31]
    kept = [index for index in range(45) if policy != "skip" or index not in missing]
    assert samples.epoch_indices(0).tolist() == kept
    for index in kept:
        sample = reader.read(0, index)
        assert sample.captions is not None
        row = sample.rows["text_third"]
        if policy == "mask" and index in missing:
            assert row is None
        else:
            assert_is_row(row, *sample.captions)
    counted = sum(samples.left_out.values()), sum(samples.without_row.values())
    assert counted == ((4, 0) if policy == "skip" else (0, 4))


def test_live_rows_where_no_words_are_read(run: dict[str, Any], gap: Path, images: Path) -> None:
    reader = reader_of(with_policy(sharelock(run, images, gap), "live"))
    for index in (3, 4):
        assert_is_row(reader.read(5, index).rows["text"], drawn(0, 5, index, WEIGHTS))


def test_live_rows_do_not_change_crops_and_are_of_the_caption_of_other_caches(
    run: dict[str, Any], gap: Path, text: Path, folder: Path, own_tars: list[Path], tmp_path: Path
) -> None:
    """Words of the sample that one cache lacks are compared with the captions of the other."""
    tree = with_policy(lift(run, gap), "live")
    tree["towers"] |= towers_of(text_b=text)
    tree["heads"] = tree["heads"] | {"b": {"of": "text_b"}}
    tree["terms"] = run["terms"] | {"b": {"x": "f", "y": "b"}}
    for data in (run["data"], tree["data"]):
        data |= {"crop_scale": 0.4}
    plain, cached = reader_of(run), reader_of(tree)
    for index in (3, 4, 31):
        one, other = plain.read(2, index), cached.read(2, index)
        assert one.image is not None
        assert other.image is not None
        assert one.image.equal(other.image)
        for tower in ("text", "text_b"):
            assert one.captions is not None
            assert_is_row(other.rows[tower], *one.captions)
    now = write_tar(tmp_path / "a.tar", changed(captioned(0, 25), 5, "changed"))
    tree["data"]["tars"] = [str(now)]
    tree["towers"]["text"]["path"] = str(build_text(tmp_path, [now], left_out=(5,)))
    tree["towers"]["text_b"]["path"] = str(build_text(tmp_path, [now], "b", before=own_tars[:1]))
    with pytest.raises(ManifestError, match=r"'s0005'.*was changed"):
        reader_of(tree).read(0, 5)


def test_a_sample_without_captions_of_the_runs_sources_is_bad(run: dict[str, Any], images: Path, text: Path) -> None:
    tree = sharelock(run, images, text)
    tree["data"]["captions"] = {"json.alt": 1.0}  # every third sample has none
    reader = reader_of(tree)
    with pytest.raises(BadSample, match=r"'s0003'.*: no caption in the cache, expected one in json\.alt") as caught:
        reader.read(0, 3)
    assert caught.value.reason == "no caption"
    reader.read(0, 4)


def test_a_data_set_of_a_mixture_without_cached_text(run: dict[str, Any], folder: Path, own_tars: list[Path]) -> None:
    own = build_text(folder, own_tars[:1], "half")
    data = {key: value for key, value in run["data"].items() if key != "tars"}
    data["datasets"] = {"with": {"tars": [str(own_tars[0])]}, "without": {"tars": [str(own_tars[1])]}}
    tree = with_policy(three_text(run | {"data": data}, own), "mask")
    (batch,) = load_batches(tree, stop=1)
    assert batch.present["text_third"].sum() == 6
    assert len(batch) == 12


def test_epochs_visit_the_tars_whose_text_is_embedded(
    run: dict[str, Any], own_tars: list[Path], tmp_path: Path
) -> None:
    growing = build_text(tmp_path, own_tars)
    (growing / "done/0.json").rename(tmp_path / "held.json")
    tree = lift(run, growing)
    with pytest.raises(ManifestError, match=r"a\.tar"):
        open_run(tree)
    tree["data"]["on_incomplete_cache"] = "skip"
    assert open_run(tree).epoch_indices(0).tolist() == list(range(25, 45))
    (tmp_path / "held.json").rename(growing / "done/0.json")
    samples = open_run(tree)
    assert samples.epoch_indices(0).tolist() == list(range(25, 45))  # as it was recorded
    assert samples.epoch_indices(1).tolist() == list(range(45))


def test_cached_and_live_text_give_the_same_loss(run: dict[str, Any], text: Path) -> None:
    config = parse(three_text(run, text))
    samples = open_run(three_text(run, text))
    reader = TrainingSampleReader(config, samples)
    found = [reader.read(0, index) for index in range(12)]
    cached = torch.from_numpy(np.concatenate([sample.rows["text_third"] for sample in found]))  # type: ignore[arg-type]
    join = samples.caches["text_third"]
    assert isinstance(join, TextJoin)
    captions = [caption for sample in found for caption in sample.captions or ()]
    live = torch.from_numpy(embed_captions(join.load_teacher().side("text"), captions, "pooled"))
    assert torch.cosine_similarity(live, cached).min() >= 0.9999
    torch.manual_seed(0)
    model = TowerModel(config, vocab_size=48, cache_widths={"text_third": join.cache.dim}).eval()
    mean, std = (torch.from_numpy(each) for each in samples.moments("text_third"))
    model.towers["text_third"].set_statistics(mean, std)  # type: ignore[operator]
    inputs = {
        "image": torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8),
        "text": torch.tensor([[5 + i, 9, 2, 0] for i in range(12)]),
    }
    totals = [float(total_loss(config, model(inputs | {"text_third": rows}))[0].detach()) for rows in (live, cached)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


@pytest.mark.distributed
def test_layouts_agree(run: dict[str, Any], text: Path, images: Path, tmp_path: Path) -> None:
    """Two ranks at ZeRO 0 to 2, also in micro-batches, and one process alone give the same losses; no encoder runs."""
    trees = {
        "3t-text": three_text(run, text),
        "lift": lift(run, text),
        "sharelock": sharelock(run, images, text),
    }
    engines: list[dict[str, Any]] = [{"zero_stage": 0}, {"zero_stage": 1, "micro_batch_size": 3}, {"zero_stage": 2}]
    alone = {kind: write_config(tree | SHORT, tmp_path, f"{kind}-one") for kind, tree in trees.items()}
    two = {
        kind: [write_config(tree | SHORT, tmp_path, f"{kind}-{i}", **engine) for i, engine in enumerate(engines)]
        for kind, tree in trees.items()
    }
    run_command([sys.executable, RUN_CONFIGS, *(file for file, _ in alone.values())])
    files = [file for configs in two.values() for file, _ in configs]
    output = run_command([*torchrun(2), RUN_CONFIGS, *files]).stdout
    for kind, (_, out) in alone.items():
        expected = np.array(losses(out))
        assert expected.shape == (2, 1 + len(trees[kind]["terms"]))
        for _, other in two[kind]:
            np.testing.assert_allclose(np.array(losses(other)), expected, rtol=2e-4)
    seen = [json.loads(line) for line in output.splitlines() if line.startswith('{"models"')]
    assert len(seen) == 9
    assert not any(memory["encoder imported"] for memory in seen)


@pytest.mark.distributed
def test_runs_resume_exactly_in_the_middle_of_an_epoch(
    run: dict[str, Any], text: Path, images: Path, tmp_path: Path
) -> None:
    """Words and rows, read by workers in any order, and rows alone, streamed."""
    third = three_text(run, text)
    third["data"] |= {"workers": 1}
    both = sharelock(run, images, text)
    both["data"] |= {"access": "sequential", "num_streams": 4, "shuffle_buffer": 16, "workers": 1}
    names = {"third": third, "both": both}
    whole = {name: write_config(tree, tmp_path, f"{name}-whole", zero_stage=1) for name, tree in names.items()}
    stopped = {name: write_config(tree, tmp_path, f"{name}-stopped", zero_stage=1) for name, tree in names.items()}
    jobs = [{"config": file} for file, _ in whole.values()]
    run_jobs(2, [*jobs, *({"config": file, "stop": 3} for file, _ in stopped.values())], tmp_path)
    ends = run_jobs(2, [{"config": file} for file, _ in stopped.values()], tmp_path)
    assert [(end["start"], end["end"]) for end in ends if end["start"]] == [(4, "finished")] * len(ends)
    for name in names:  # three steps an epoch
        assert same_weights(whole[name][1], stopped[name][1])
        assert metric(whole[name][1], "loss") == metric(stopped[name][1], "loss")


def test_the_start_page_says_what_each_tower_is_and_what_is_not_read(
    run: dict[str, Any], text: Path, images: Path
) -> None:
    tree = sharelock(run, images, text)
    samples = open_run(tree)
    assert "read: no image is decoded, no word is read" in samples.notes()
    (survey,) = survey_annotations(parse(tree), samples)
    assert survey == (
        "captions: from json.alt (weight 3) in 30, from txt (weight 1) in 45 of 45 samples looked at, as the cache has "
        "them"
    )
    lines = dry_run(parse(tree))
    assert (
        f"tower text: test:bag, 24 features of the drawn caption = 48 bytes a sample read from {text}, no forward "
        in (" ".join(lines))
    )
    assert open_run(lift(run, text)).notes()[-1] == "read: no word is read"
    tree["data"]["captions"] = {"json.nothing": 1.0}
    with pytest.raises(ManifestError, match=r"data\.captions draws from"):
        open_run(tree)


def test_a_dry_run_without_the_caches(run: dict[str, Any], text: Path, images: Path, tmp_path: Path) -> None:
    tree = sharelock(run, tmp_path / "images", tmp_path / "text")
    tree["towers"]["image"]["dim"] = 24
    with pytest.raises(ConfigError, match=r"towers\.text\.dim: give it; the width of rows of text is unknown"):
        dry_run(parse(tree))
    tree["towers"]["text"] |= {"dim": 40, "encoder": "test:bag"}
    assert any("tower text: test:bag, 40 features of the drawn caption" in line for line in dry_run(parse(tree)))
    tree["towers"]["text"]["path"] = str(text)
    tree["towers"]["image"]["path"] = str(images)
    with pytest.raises(ManifestError, match="dim: the tower expects rows of width 40, found 24"):
        open_run(tree)
    tree["towers"]["text"] |= {"path": str(images)}
    with pytest.raises(ManifestError, match="of: the tower expects a cache of text, found one of image"):
        dry_run(parse(tree))
