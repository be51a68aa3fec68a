"""Terms of all kinds: what is refused; values and gradients against dense ones; which teachers take part in a step."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from tests.trainer.small_models import inputs_of
from tests.trainer.test_config import THREE
from threetowers.kernels import Teacher, reference_contrastive_loss, reference_distillation_loss
from threetowers.trainer.config import ConfigError, TrainConfig, dump, parse
from threetowers.trainer.loss import TermResult, total_loss
from threetowers.trainer.loss.teachers import kept_teachers
from threetowers.trainer.model.model import Outputs, TowerModel

SAMPLES = 11
LOCAL = (slice(0, 7), slice(7, SAMPLES))
CACHED = {"kind": "cache", "path": "c", "standardize": "none"}
TEACHERS: dict[str, Any] = {
    "clip": {"x": "u_clip", "y": "v_clip", "temperature": 0.05, "weight": "1/3"},
    "images": {"x": "u_dino", "y": "u_dino", "temperature": "other"},
}
# Widths of the heads; those of teachers stand on caches and have no parameters.
WIDTHS = {"f": 6, "g": 6, "u_clip": 5, "v_clip": 5, "u_dino": 7, "f_clip": 5}
STUDENT = ("f", "g", "f_clip")
TOWERS = {"clip_image": "image", "clip_text": "text", "dino": "image"}


def distilled(**changes: Any) -> dict[str, Any]:
    """A student of two teachers, one of them on a single tower; and terms of all other kinds."""
    terms = {
        "image-text": {"x": "f", "y": "g", "weight": 0.5},
        "taught": {"x": "f", "y": "g", "kind": "distill", "teachers": copy.deepcopy(TEACHERS)},
        "both": {"x": "g", "y": "f", "kind": "distill", "scale": "other", "hard_weight": 0.25, "weight": 2.0},
        "distance": {"x": "f_clip", "y": "u_clip", "kind": "l2"},
        "angle": {"x": "f_clip", "y": "u_clip", "kind": "cosine", "weight": 0.9},
        "features": {"x": "f_clip", "y": "u_clip", "kind": "smooth_l1", "beta": 0.3},
    }
    terms["both"]["teachers"] = {"clip": {"x": "v_clip", "y": "u_clip", "temperature": 0.2}}
    heads: dict[str, Any] = {"f": {"of": "image"}, "g": {"of": "text"}, "f_clip": {"of": "image", "embed_dim": 5}}
    heads |= {"u_clip": {"of": "clip_image"}, "v_clip": {"of": "clip_text"}, "u_dino": {"of": "dino"}}
    for name in ("u_clip", "v_clip", "u_dino"):
        heads[name]["kind"] = "none"
    towers = {name: THREE["towers"][name] for name in ("image", "text")}
    towers |= {name: CACHED | {"of": of} for name, of in TOWERS.items()}
    return THREE | {"embed_dim": 6, "towers": towers, "heads": heads, "terms": terms} | changes


def edited(path: str, value: Any) -> dict[str, Any]:
    """The student of two teachers, with one key changed."""
    tree = copy.deepcopy(distilled())
    *keys, last = path.split(".")
    node = tree
    for key in keys:
        node = node.setdefault(key, {})
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("terms.taught.teachers", {}, r"terms\.taught\.teachers: expected one teacher or more, found none"),
        ("terms.taught.kind", "contrastive", r"terms\.taught\.teachers: found \['clip', 'images'\] with kind: contra"),
        ("terms.distance.hard_weight", 0.5, r"terms\.distance\.hard_weight: found 0\.5 with kind: l2, .*kind: distill"),
        ("terms.angle.drop_teachers", 0.5, r"terms\.angle\.drop_teachers: found 0\.5 with kind: cosine"),
        ("terms.angle.beta", 0.5, r"terms\.angle\.beta: found 0\.5 with kind: cosine, .* set kind: smooth_l1"),
        ("terms.features.beta", 0.0, r"terms\.features\.beta: .*greater than 0"),
        ("terms.taught.drop_teachers", 1.0, r"terms\.taught\.drop_teachers: .*less than 1"),
        ("terms.both.drop_teachers", 0.5, r"terms\.both\.drop_teachers: found 0\.5 with one teacher, clip"),
        ("terms.taught.hard_weight", 1.5, r"terms\.taught\.hard_weight: .*less than or equal to 1"),
        (
            "terms.taught.teachers.clip.x",
            "u",
            r"terms\.taught\.teachers\.clip\.x: found 'u', expected one of",
        ),
        (
            "terms.taught.teachers.clip.y",
            "g",
            r"clip\.y: 'g' has trained parameters, those of the head 'g' of kind",
        ),
        ("heads.v_clip", {"of": "text", "kind": "none"}, r"teachers\.clip\.y: 'v_clip' is on the trained tower 'text'"),
        ("towers.clip_text.standardize", "moments", r"towers\.clip_text\.standardize: found moments, .* set none"),
        ("towers.clip_text.standardize", False, r"towers\.clip_text\..*standardize: .*'none'.*found False"),
        (
            "terms.taught.teachers.clip.temperature",
            "warm",
            r"clip\.temperature: found 'warm', expected a number",
        ),
        ("terms.taught.teachers.clip.temperature", -1, r"clip\.temperature.*greater than 0"),
        ("terms.taught.teachers.clip.weight", 0, r"clip\.weight: .*greater than 0"),
        ("terms.taught.teachers.clip.bias", -3.0, r"clip\.bias: found -3\.0, but softmax is the same at any bias"),
        ("loss.kind", "sigmoid", r"terms\.taught\.teachers\.clip\.bias: the sigmoid loss needs the bias"),
        ("global_batch_size", 1, r"global_batch_size: found 1, but the terms \['image-text', 'taught', 'both'\]"),
    ],
)
def test_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(edited(path, value))


def test_a_bias_beside_a_learned_scale_is_refused() -> None:
    tree = edited("terms.taught.teachers.images.bias", -3.0)
    tree["loss"] = {"kind": "sigmoid"}
    for name in ("taught", "both"):
        tree["terms"][name]["teachers"]["clip"]["bias"] = -3.0
    with pytest.raises(
        ConfigError, match=r"images\.bias: found -3\.0, but the scale 'other' has its own; leave it out"
    ):
        parse(tree)


def test_widths_of_a_teacher_must_agree() -> None:
    config = parse(distilled())
    with pytest.raises(ValueError, match=r"terms\.taught\.teachers\.clip: 'u_clip' has width 5, 'v_clip' has 4; name"):
        TowerModel(config, 48, {"clip_image": 5, "clip_text": 4, "dino": 7})


def test_a_teacher_that_is_null_is_left_out() -> None:
    tree = edited("terms.taught.teachers.images", None)
    tree["towers"]["dino"] = tree["heads"]["u_dino"] = None
    config = parse(tree)
    assert list(config.terms["taught"].teachers) == ["clip"]
    assert parse(dump(config)) == config


def test_a_temperature_that_yaml_reads_as_text() -> None:
    teacher = parse(edited("terms.taught.teachers.clip.temperature", "1e-2")).terms["taught"].teachers["clip"]
    assert teacher.temperature == 0.01


def test_dropped_teachers_are_a_function_of_seed_and_step() -> None:
    tree = edited("terms.taught.teachers.third", TEACHERS["clip"])
    term = parse(tree).terms["taught"]
    assert kept_teachers(0, 3, "t", term) == ["clip", "images", "third"]
    tree["terms"]["taught"]["drop_teachers"] = 0.6
    term = parse(tree).terms["taught"]
    found = [kept_teachers(5, step, "t", term) for step in range(3000)]
    assert all(found)
    assert found == [kept_teachers(5, step, "t", term) for step in range(3000)]
    assert found != [kept_teachers(6, step, "t", term) for step in range(3000)]
    assert found != [kept_teachers(5, step, "u", term) for step in range(3000)]
    kept = 1 - 0.6 * 2 / 3  # one of three always stays
    for name in term.teachers:
        share = np.mean([name in names for names in found])
        assert share == pytest.approx(kept, abs=4 * (kept * (1 - kept) / 3000) ** 0.5)


def test_live_frozen_towers_teach() -> None:
    """A teacher needs no cache: its towers run forward alone, and what is frozen stays as it is."""
    tree = copy.deepcopy(THREE)
    del tree["towers"]["third"], tree["heads"]["h_f"], tree["heads"]["f_h"]
    live = {"frozen": True, "init": "weights.safetensors"}
    tree["towers"] |= {"big": tree["towers"]["image"] | live, "words": tree["towers"]["text"] | live | {"width": 64}}
    tree["towers"]["words"]["heads"] = 4
    tree["heads"] |= {"u": {"of": "big", "kind": "none"}, "v": {"of": "words", "kind": "none"}}
    teachers = {"live": {"x": "u", "y": "v", "temperature": 0.1}}
    tree["terms"] = {"taught": {"x": "f", "y": "g", "kind": "distill", "teachers": teachers}}
    model = TowerModel(parse(tree), 48, {})
    inputs = {name: inputs_of(5)[side] for side, names in SEEN.items() for name in names}
    outputs = model(inputs)
    assert not outputs.embeddings["u"].requires_grad
    assert not outputs.embeddings["v"].requires_grad
    loss, report = total_loss(model.config, outputs)
    scale = torch.tensor([0.1]).log().neg()
    x = {name: embedding_bD.detach() for name, embedding_bD in outputs.embeddings.items()}
    teacher = Teacher(x["u"], x["v"], scale)
    dense = reference_distillation_loss(x["f"], x["g"], model.log_scales["scale"].detach(), [teacher])
    torch.testing.assert_close(report["taught"].loss.double(), dense, rtol=1e-5, atol=0)
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith(("towers.big", "towers.words")), name


SEEN = {"image": ("image", "big"), "text": ("text", "words")}

# Which of the samples have a row in each cache; rank 0 holds the first 7.
PRESENT = {
    "all": {},
    "some": {"clip_text": [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1], "dino": [1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1]},
    "none on rank 1": {"clip_text": [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0]},
    "none at all": {"dino": [0] * SAMPLES},
}
ROOTS = {"u_clip": "clip_image", "v_clip": "clip_text", "u_dino": "dino"}


def leaves() -> dict[str, Tensor]:
    """A linear map for each head of the student, scales and biases."""
    g = torch.Generator().manual_seed(1)
    maps = {name: torch.randn(8, WIDTHS[name], generator=g) for name in STUDENT}
    scales = {"log scale": torch.tensor([0.7]), "log other": torch.tensor([1.1])}
    biases = {"bias scale": torch.tensor([-0.4]), "bias other": torch.tensor([0.3])}
    return {name: value.requires_grad_() for name, value in (maps | scales | biases).items()}


def embeddings(values: dict[str, Tensor], mine: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(SAMPLES, 8, generator=g)
    found = {name: inputs[mine].to(dtype) @ values[name].to(dtype) for name in STUDENT}
    found |= {name: torch.randn(SAMPLES, WIDTHS[name], generator=g)[mine].to(dtype) for name in ROOTS}
    return {name: F.normalize(x, dim=1) for name, x in found.items()}


def config_of(kind: str, **loss: Any) -> TrainConfig:
    tree = distilled(loss={"kind": kind, **loss})
    if kind == "sigmoid":
        tree["terms"]["taught"]["teachers"]["clip"]["bias"] = -2.0
        tree["terms"]["both"]["teachers"]["clip"]["bias"] = 0.5
    tree["terms"]["taught"]["drop_teachers"] = 0.4
    return parse(tree)


def found_loss(
    config: TrainConfig, case: str, step: int, groups_B: Tensor | None, mine: slice, values: dict[str, Tensor]
) -> tuple[Tensor, dict[str, TermResult]]:
    x = embeddings(values, mine, torch.float32)
    present = {tower: torch.tensor(has, dtype=torch.bool)[mine] for tower, has in PRESENT[case].items()}
    for head, tower in ROOTS.items():  # what a sample without a row holds must not matter
        if tower in present:
            x[head] = torch.where(present[tower][:, None], x[head], torch.tensor(1e4))
    names = ("scale", "other")
    biases = {name: values[f"bias {name}"] for name in names} if config.loss.kind == "sigmoid" else {}
    outputs = Outputs(x, {name: values[f"log {name}"] for name in names}, biases)
    return total_loss(config, outputs, None if groups_B is None else groups_B[mine], present, step)


def dense_loss(
    config: TrainConfig, case: str, step: int, groups_B: Tensor | None, values: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Each term from full matrices, over the samples that have all its towers, in float64."""
    x = embeddings(values, slice(None), torch.float64)
    sigmoid = config.loss.kind == "sigmoid"
    losses: dict[str, Tensor] = {}
    for name, term in config.terms.items():
        keep = torch.ones(SAMPLES, dtype=torch.bool)
        for head in term.all_heads:
            keep &= torch.tensor(PRESENT[case].get(ROOTS.get(head, ""), [1] * SAMPLES), dtype=torch.bool)
        if not keep.any():
            losses[name] = torch.zeros((), dtype=torch.float64)
            continue
        a, b = x[term.x][keep], x[term.y][keep]
        error = a - b
        if term.kind == "l2":
            losses[name] = error.square().sum(1).mean()
        elif term.kind == "cosine":
            losses[name] = (1 - (a * b).sum(1)).mean()
        elif term.kind == "smooth_l1":
            huber = torch.where(error.abs() < term.beta, error**2 / (2 * term.beta), error.abs() - term.beta / 2)
            losses[name] = huber.sum(1).mean()
        else:
            log_scale = values[f"log {term.scale}"].double()
            bias = values[f"bias {term.scale}"].double() if sigmoid else None
            ids = groups_B[keep] if groups_B is not None and term.masks_groups else None
            options: dict[str, Any] = {"bias": bias, "kind": config.loss.kind, "group_ids": ids}
            if term.kind == "contrastive":
                losses[name] = reference_contrastive_loss(a, b, log_scale, **options)
                continue
            teachers = []
            for teacher in (term.teachers[key] for key in kept_teachers(config.seed, step, name, term)):
                of_scale = isinstance(teacher.temperature, str)
                scale = (
                    values[f"log {teacher.temperature}"].detach()
                    if of_scale
                    else -torch.tensor([float(teacher.temperature)], dtype=torch.float64).log()
                )
                own = values[f"bias {teacher.temperature}"].detach() if of_scale else torch.tensor([teacher.bias or 0])
                u, v = x[teacher.x][keep], x[teacher.y][keep]
                teachers.append(Teacher(u, v, scale, own.double() if sigmoid else None, teacher.weight))
            losses[name] = reference_distillation_loss(
                a, b, log_scale, teachers, hard_weight=term.hard_weight, **options
            )
    total = torch.stack([config.terms[name].weight * loss for name, loss in losses.items()]).sum()
    return total, losses


def check(rank: int, ranks: int) -> None:
    mine = slice(None) if ranks == 1 else LOCAL[rank]
    cases = [(kind, ring) for kind in ("softmax", "sigmoid") for ring in ([False, True] if ranks > 1 else [False])]
    for kind, ring in cases:
        config = config_of(kind, ring=ring)
        dropped = [len(kept_teachers(config.seed, step, "taught", config.terms["taught"])) for step in (0, 1, 2, 3)]
        assert set(dropped) == {1, 2}, dropped
        for step, case in enumerate(PRESENT):
            for groups_B in (None, torch.arange(SAMPLES) % 4):
                values, reference = leaves(), leaves()
                total, report = found_loss(config, case, step, groups_B, mine, values)
                expected, losses = dense_loss(config, case, step, groups_B, reference)
                torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
                for name, loss in losses.items():
                    torch.testing.assert_close(report[name].loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
                    keys = {"loss", "accuracy", "scale"} if config.terms[name].has_scale else {"loss"}
                    assert report[name].metrics().keys() == keys
                total.backward()
                expected.backward()
                for name, leaf in values.items():
                    grad, want = leaf.grad, reference[name].grad
                    if kind == "softmax" and name.startswith("bias"):
                        assert grad is want is None
                        continue
                    assert grad is not None
                    if ranks > 1:
                        dist.all_reduce(grad)
                    message = f"{kind} {case} {name}"
                    torch.testing.assert_close(grad / ranks, want, rtol=1e-4, atol=2e-6, msg=message)


def test_one_process() -> None:
    check(0, 1)


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check(rank, 2)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=2)
