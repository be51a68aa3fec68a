"""Configs: what is refused and how it is said, what survives a round trip."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from threetowers.trainer.config import ConfigError, Duration, differences, dump, load, parse

THREE: dict[str, Any] = {
    "output_dir": "runs/x",
    "global_batch_size": 8,
    "duration": {"epochs": 2},
    "embed_dim": 16,
    "data": {"tars": ["a.tar"], "tokenizer": "t.model", "image_size": 32},
    "towers": {
        "image": {"kind": "timm", "model": "test_vit"},
        "text": {"kind": "text", "width": 16, "depth": 1, "heads": 2},
        "third": {"kind": "cache", "path": "c"},
    },
    "heads": {"f": {"of": "image"}, "g": {"of": "text"}, "f_h": {"of": "f"}, "h_f": {"of": "third"}},
    "terms": {"image-text": {"x": "f", "y": "g"}, "image-third": {"x": "f_h", "y": "h_f"}},
    "deploy": {"image": "f", "text": "g"},
}


ROOT = Path(__file__).parents[2]
RUNS = sorted([*ROOT.glob("configs/emoji/*.yaml"), *ROOT.glob("configs/papers/*.yaml")])


def changed(path: str, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(THREE)
    *keys, last = path.split(".")
    node = tree
    for key in keys:
        node = node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return tree


def test_round_trip() -> None:
    run = parse(THREE)
    assert parse(yaml.safe_load(yaml.safe_dump(dump(run)))) == run


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.lrr", 1, r"optim\.lrr: Unexpected keyword"),
        ("optim.lr", "fast", r"optim\.lr: .*number.*'fast'"),
        ("optim.lr", -1.0, r"optim\.lr: .*greater than 0"),
        ("global_batch_size", 0, r"global_batch_size: .*greater than or equal to 1"),
        ("engine.zero_stage", 4, r"engine\.zero_stage: .*0, 1, 2 or 3.*found 4"),
        ("towers.third.kind", "cached", r"towers\.third: .*'cached'"),
        ("towers.text.width", None, r"towers\.text\.text\.width: .*required"),
        ("heads.f.of", "img", r"heads\.f\.of: 'img' is no tower and no earlier head; known here: "),
        ("heads.image", {"of": "text"}, r"heads\.image: a tower has that name"),
        ("terms.image-text.y", "h", r"terms\.image-text\.y: 'h' is no head; heads are "),
        ("terms.image-text.y", "f", "a pair needs two heads"),
        ("deploy.text", "f", "does not stand on a text tower"),
        ("deploy.image", "g", "stands on a text tower"),
        ("duration.steps", 3, r"exactly one of .*found \['epochs', 'steps'\]"),
        ("terms.image-third", None, r"towers: \['third'\] are used by no term"),
        ("data.tars", [], r"data\.tars: expected at least one"),
        ("data.crop_scale", 0.5, r"\['third'\] hold the embedding of the uncropped view only; set crop_scale: 1\.0"),
    ],
)
def test_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(changed(path, value))


def test_numbers_that_yaml_reads_as_text() -> None:
    assert parse(yaml.safe_load(yaml.safe_dump(THREE) + "optim: {lr: 1e-4}")).optim.lr == 1e-4


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(THREE))
    run = load(file, ["optim.lr=3e-4", "data.tars=[x.tar, y.tar]", "engine.zero_stage=3"])
    assert (run.optim.lr, run.data.tars, run.engine.zero_stage) == (3e-4, ["x.tar", "y.tar"], 3)
    for wrong, message in [
        ("optim.lr", "expected key.path=value"),
        ("batch.x=1", "holds a value"),
        ("a=[", "not YAML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load(file, [wrong])


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", ""])
def test_file_that_is_no_config(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=str(file)):
        load(file)
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        load(tmp_path / "no.yaml")


def test_differences_name_the_leaves() -> None:
    found = differences(parse(THREE), parse(changed("optim.lr", 0.5)))
    assert [str(d) for d in found] == ["optim.lr: 0.001 -> 0.5"]


def test_durations() -> None:
    assert Duration(steps=7).in_steps(100, 32) == 7
    assert Duration(examples=1000).in_steps(100, 32) == 31
    assert Duration(epochs=2.5).in_steps(100, 32) == 8  # 2.5 x 3 whole batches


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_shipped_configs_are_valid(file: Path) -> None:
    run = load(file)
    assert str(file.relative_to(ROOT)) in file.read_text().split("\n\n")[0]  # how to run it
    assert run.output_dir.endswith(file.stem)
