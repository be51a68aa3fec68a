"""Several captions of a sample: the draws, the batches, the loss of each kind of term, micro-batches, a whole run."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.launches import RUN_CONFIGS, losses, run_command, torchrun, write_config
from tests.trainer.loading import load_batches, open_run
from tests.trainer.small_models import inputs_of, model_of
from tests.trainer.test_config import THREE
from tests.trainer.test_grad_cache import grad_cache_of, one_process_group
from tests.trainer.text_runs import build_images, build_text, lift, run_of, sharelock, three_text, write_tars
from threetowers.cache.webdataset.captions import CaptionFormat
from threetowers.kernels import reference_contrastive_loss
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data.batch import Batch, join_parts, owners
from threetowers.trainer.data.loader import TrainingSampleReader
from threetowers.trainer.data.row_batches import RowReader, is_rows_alone
from threetowers.trainer.estimate.cost import meta_model
from threetowers.trainer.estimate.loss_cost import term_costs
from threetowers.trainer.loss import total_loss

__all__ = ["one_process_group"]

CAPTIONS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several-captions")


@pytest.fixture(scope="module")
def own_tars(folder: Path) -> list[Path]:
    return write_tars(folder / "tars")


@pytest.fixture(scope="module")
def text(folder: Path, own_tars: list[Path]) -> Path:
    return build_text(folder, own_tars, dtype="float32")


@pytest.fixture
def run(clip: dict[str, Any], own_tars: list[Path]) -> dict[str, Any]:
    tree = run_of(copy.deepcopy(clip), own_tars)
    tree["data"]["captions_per_sample"] = CAPTIONS
    return tree


def with_captions(tree: dict[str, Any], captions: int) -> dict[str, Any]:
    return tree | {"data": tree["data"] | {"captions_per_sample": captions}}


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_draws_differ_and_begin_with_the_one_alone(most: int) -> None:
    captions = CaptionFormat({"txt": 1.0, "json.alt": 3.0})
    counts = {"txt": 1, "json.alt": 3}
    seen = set()
    for seed in range(60):
        places = captions.draw_places(counts, most, np.random.default_rng(seed))
        assert len(places) == len(set(places)) == min(most, 4)
        assert all(0 <= position < counts[source] for source, position in places)
        assert places[0] == captions.draw_place(counts, np.random.default_rng(seed))
        seen.add(tuple(places))
    assert len(seen) > 3


def test_samples_have_what_there_is_with_equal_draws_of_words_and_rows(run: dict[str, Any], text: Path) -> None:
    """Of one to three captions two are drawn; the first is that of a run with one."""
    tree = three_text(run, text)
    reader, one = (TrainingSampleReader(parse(each), open_run(each)) for each in (tree, with_captions(tree, 1)))
    silent = lift(run, text)
    rows_alone = TrainingSampleReader(parse(silent), open_run(silent))
    assert "captions: an epoch shows 2 of a sample, or all where it has fewer" in open_run(tree).notes()
    assert not any(line.startswith("captions: ") for line in open_run(with_captions(tree, 1)).notes())
    counts = set()
    for index in range(45):
        sample, first = reader.read(3, index), one.read(3, index)
        assert sample.captions is not None
        assert first.captions == sample.captions[:1]
        assert len(set(sample.captions)) == len(sample.captions) == sample.num_captions == min(CAPTIONS, 1 + index % 3)
        rows = sample.rows["text_third"]
        assert rows is not None
        assert np.array_equal(rows[:1], first.rows["text_third"])  # type: ignore[arg-type]
        assert np.array_equal(rows, rows_alone.read(3, index).rows["text"])  # type: ignore[arg-type]
        counts.add(sample.num_captions)
    assert counts == {1, 2}


@pytest.mark.parametrize("kind", ["words and rows", "rows alone"])
@pytest.mark.parametrize("access", ["random", "sequential"])
def test_batches_hold_the_captions_of_their_samples(
    run: dict[str, Any], text: Path, folder: Path, own_tars: list[Path], kind: str, access: str
) -> None:
    images = folder / "images"
    if not images.exists():
        build_images(folder, own_tars)
    tree = three_text(run, text) if kind == "words and rows" else sharelock(run, images, text)
    tree["data"] |= {"access": access, "shuffle_buffer": 16}
    samples = open_run(tree)
    assert is_rows_alone(samples) == (kind == "rows alone")
    tower = "text_third" if kind == "words and rows" else "text"
    reader = TrainingSampleReader(parse(tree), samples)
    by_rows = {}  # the sample of each row of the cache
    for index in range(45):
        for row in reader.read(0, index).rows[tower]:  # type: ignore[union-attr]
            by_rows[row.tobytes()] = index
    found = load_batches(tree, stop=3)
    assert sum(len(batch.inputs[tower]) for batch in found) > 40
    for batch in found:
        assert batch.owner_m is not None
        assert len(batch.owner_m) == len(batch.inputs[tower])
        assert len(batch) == 12
        assert batch.owner_m.unique().tolist() == list(range(12))
        assert (batch.owner_m.diff() >= 0).all()
        own = [by_rows[row.numpy().tobytes()] for row in batch.inputs[tower]]
        for at in range(12):
            of_sample = {index for index, owner in zip(own, batch.owner_m.tolist(), strict=True) if owner == at}
            assert len(of_sample) == 1
        if kind == "words and rows":
            assert len(batch.inputs["text"]) == len(batch.owner_m)
            assert len(batch.inputs["image"]) == 12


def test_rows_alone_are_those_of_single_samples(
    run: dict[str, Any], text: Path, folder: Path, own_tars: list[Path]
) -> None:
    """Also where one of two caches lacks a sample: it has as many zeros as the sample has captions in the other."""
    gap = build_text(folder, own_tars, "gap", dtype="float32", left_out=(0, 4, 19))
    tree = sharelock(run, text, text)
    tree["towers"] = {name: {"kind": "cache", "of": "text", "path": str(text)} for name in ("image", "text")}
    tree["towers"]["image"] |= {"path": str(build_images(folder, own_tars, "images-2")), "of": "image"}
    tree["towers"]["gap"] = {"kind": "cache", "of": "text", "path": str(gap), "on_missing_row": "mask"}
    tree["heads"] |= {"t": {"of": "gap"}}
    tree["terms"] = tree["terms"] | {"third": {"x": "f", "y": "t"}}
    for captions in (2, 3):
        several = with_captions(tree, captions)
        samples = open_run(several)
        reader = TrainingSampleReader(parse(several), samples)
        batch = RowReader(samples).read([(epoch, index) for epoch in (0, 5) for index in range(45)])
        assert batch.owner_m is not None
        for at, index in enumerate(batch.groups_b.tolist()):
            sample = reader.read(5 * (at // 45), index)
            own = batch.owner_m == at
            assert int(own.sum()) == sample.num_captions == min(captions, 1 + index % 3)
            for tower in ("text", "gap"):
                row = sample.rows[tower]
                expected = np.zeros((sample.num_captions, batch.inputs[tower].shape[1])) if row is None else row
                assert np.array_equal(batch.inputs[tower][own].numpy(), expected), (tower, index)
            assert bool(batch.present["gap"][at]) == (sample.rows["gap"] is not None)
        assert not batch.present["gap"].all()


def test_parts_are_joined_caption_by_caption() -> None:
    parts = []
    for counts in ([2, 1], [], [3]):
        m = sum(counts)
        inputs = {"image": torch.randn(len(counts), 4), "text": torch.randn(m, 5)} if counts else {}
        groups_b = torch.zeros(len(counts), dtype=torch.int64)
        parts.append(Batch(inputs, {}, groups_b, (), owner_m=owners(counts) if counts else None))
    joined = join_parts(parts, samples=5, most_captions={"text": 3, "image": 1})
    assert joined.owner_m is not None
    assert joined.owner_m.tolist() == [0, 0, 1, 2, 2, 2]
    assert joined.inputs["text"].equal(torch.cat([parts[0].inputs["text"], parts[2].inputs["text"]]))
    assert len(joined) == len(joined.inputs["image"]) == 3


COUNTS = [1, 2, 2, 1, 2, 1, 2, 2, 1, 1]


def captioned_inputs() -> tuple[dict[str, Tensor], Tensor]:
    owner_m = owners(COUNTS)
    images = inputs_of(len(COUNTS))
    return images | {"text": inputs_of(len(owner_m))["text"]}, owner_m


def three(**terms: dict[str, Any]) -> dict[str, Any]:
    tree = copy.deepcopy(THREE)
    tree["data"]["captions_per_sample"] = CAPTIONS
    for name, change in terms.items():
        tree["terms"][name] |= change
    return tree


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_terms_equal_their_dense_form(one_process_group: None, kind: str, missing: bool, grouped: bool) -> None:
    """Terms of all captions, with text first, of the first captions, without negatives, of texts, and of images."""
    tree = three()
    tree["loss"] = {"kind": kind}
    tree["heads"] |= {"g_2": {"of": "text"}}
    base = next(iter(tree["terms"].values()))
    tree["terms"] = {
        "all": base | {"x": "f", "y": "g"},
        "turned": base | {"x": "g", "y": "h_f"},
        "one": base | {"x": "f_h", "y": "g", "positives": "one"},
        "near": {"x": "f", "y": "g", "kind": "l2"},
        "texts": base | {"x": "g", "y": "g_2"},
        "images": base | {"x": "f_h", "y": "h_f"},
    }
    if missing:
        tree["towers"]["third"]["on_missing_row"] = "mask"
    model = model_of(tree).double()
    inputs, owner_m = captioned_inputs()
    groups_b = torch.arange(len(COUNTS)) // 2 if grouped else None
    has_b = torch.arange(len(COUNTS)) % 4 != 1 if missing else torch.ones(len(COUNTS), dtype=torch.bool)
    outputs = model(inputs)
    _, report = total_loss(model.config, outputs, groups_b, {"third": has_b} if missing else {}, owner_m=owner_m)
    e = {name: part.detach() for name, part in outputs.embeddings.items()}
    first_b = torch.searchsorted(owner_m, torch.arange(len(COUNTS)))
    kept_m = has_b[owner_m]
    renumbered_m = (has_b.cumsum(0) - 1)[owner_m][kept_m]
    own_groups_b = torch.arange(len(COUNTS)) if groups_b is None else groups_b
    options: dict[str, Any] = {"kind": kind}

    def reference(name: str, x: Tensor, y: Tensor, group_ids: Tensor | None, owner: Tensor | None = None) -> Tensor:
        scale = model.config.terms[name].scale
        bias = outputs.biases[scale].detach() if kind == "sigmoid" else None
        scale_1 = outputs.log_scales[scale].detach()
        return reference_contrastive_loss(x, y, scale_1, bias=bias, group_ids=group_ids, owner=owner, **options)

    of_third = None if groups_b is None else groups_b[has_b]
    truth = {
        "all": reference("all", e["f"], e["g"], groups_b, owner_m),
        "turned": reference("turned", e["h_f"][has_b], e["g"][kept_m], of_third, renumbered_m),
        "one": reference("one", e["f_h"], e["g"][first_b], groups_b),
        "near": (e["f"][owner_m] - e["g"]).square().sum(1).mean(),
        "texts": reference("texts", e["g"], e["g_2"], own_groups_b[owner_m]),
        "images": reference("images", e["f_h"][has_b], e["h_f"][has_b], of_third),
    }
    for name, want in truth.items():
        torch.testing.assert_close(report[name].loss.double(), want.double(), rtol=2e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("parts", [1, 3])
def test_micro_batches_hold_the_captions_of_their_samples(one_process_group: None, parts: int) -> None:
    inputs, owner_m = captioned_inputs()
    model = model_of(three()).double()
    grad_cache_of(model, parts)(inputs, 0, owner_m=owner_m)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reference = model_of(three()).double()
    total_loss(reference.config, reference(inputs), owner_m=owner_m)[0].backward()
    for name, p in reference.named_parameters():
        if p.grad is not None:
            assert float((found[name] - p.grad).norm()) <= 1e-5 * float(p.grad.norm()) + 1e-7, name


def test_one_positive_is_the_run_with_one_caption(one_process_group: None) -> None:
    inputs, owner_m = captioned_inputs()
    names = list(THREE["terms"])
    model = model_of(three(**{name: {"positives": "one"} for name in names}))
    first_b = torch.searchsorted(owner_m, torch.arange(len(COUNTS)))
    alone = model_of(copy.deepcopy(THREE))
    found, _ = total_loss(model.config, model(inputs), owner_m=owner_m)
    want, _ = total_loss(alone.config, alone(inputs | {"text": inputs["text"][first_b]}))
    torch.testing.assert_close(found, want)


def test_teachers_compare_one_caption() -> None:
    tree = three()
    name = next(name for name, term in tree["terms"].items() if {term["x"], term["y"]} == {"f", "g"})
    tree["heads"] |= {"u": {"of": "third", "kind": "none"}}
    teachers = {"classifier": {"x": "u", "y": "u", "temperature": 0.1}}
    tree["terms"][name] |= {"kind": "distill", "teachers": teachers}
    message = rf"terms.{name}.positives: found all with data.captions_per_sample: 2.*set positives: one"
    with pytest.raises(ConfigError, match=message):
        parse(tree)
    tree["terms"][name]["positives"] = "one"
    assert parse(tree).terms[name].positives == "one"


def test_costs_count_captions() -> None:
    costs = []
    for captions in (1, 3):
        tree = three()
        tree["data"]["captions_per_sample"] = captions
        model = meta_model(parse(tree), 48, {"third": type("Cost", (), {"dim": 20})()})  # type: ignore[dict-item]
        costs.append(term_costs(model, 1))
    for name, term in parse(three()).terms.items():
        times = 3 if parse(three()).pairing(term) == "captions" else 1
        assert costs[1][name].flops == pytest.approx(times * costs[0][name].flops, rel=0.01)


@pytest.mark.parametrize(
    ("frozen", "rows", "columns"), [("", 1, 1), ("image", 0, 1), ("text", 1, 0)], ids=["none", "image", "text"]
)
def test_costs_count_the_gradients_of_what_learns(frozen: str, rows: int, columns: int) -> None:
    """Captions are the columns, whichever side learns."""
    config = parse(three())
    model = meta_model(config, 48, {"third": type("Cost", (), {"dim": 20})()})  # type: ignore[dict-item]
    for name in config.heads:
        if config.root_of(name) == frozen:
            model.heads[name].requires_grad_(False)
            model.towers[frozen].requires_grad_(False)
    (cost,) = (cost for name, cost in term_costs(model, 1).items() if name == "image-text")
    gradients = config.global_batch_size * (rows + columns * CAPTIONS)
    assert cost.feature_bytes == gradients * model.widths["f"] * 4  # alone, no columns are gathered
    assert cost.passes == CAPTIONS * (1 + rows + columns)  # all tiles are kept


@pytest.mark.distributed
def test_layouts_agree(run: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """One process, two ranks, and two ranks in micro-batches give the same losses, from tars to metrics."""
    short = {"duration": {"steps": 2}, "log": {"every_steps": 1, "tensorboard": False}}
    tree = three_text(run, text) | short
    alone, out = write_config(tree, tmp_path, "one")
    pairs = [write_config(tree, tmp_path, "two"), write_config(tree, tmp_path, "three", micro_batch_size=4)]
    run_command([sys.executable, RUN_CONFIGS, alone])
    run_command([*torchrun(2), RUN_CONFIGS, *(file for file, _ in pairs)])
    expected = np.array(losses(out))
    assert expected.shape == (2, 1 + len(tree["terms"]))
    for _, other in pairs:
        np.testing.assert_allclose(np.array(losses(other)), expected, rtol=2e-4)
