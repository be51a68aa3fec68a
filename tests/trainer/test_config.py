"""Configs: what is refused and with which message, bases, variants and overrides, and the reference of keys."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from tests.trainer.shipped_configs import ROOT, RUNS
from threetowers.trainer.config import ConfigError, Duration, TrainConfig, dump, load_config, parse
from threetowers.trainer.config.documentation import config_reference
from threetowers.trainer.config.towers import TOWER_KINDS
from threetowers.trainer.run.run_folder import config_changes

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


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return THREE with one key changed, or removed if the value is None."""
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
    config = parse(THREE)
    assert parse(yaml.safe_load(yaml.safe_dump(dump(config)))) == config


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
        ("heads.f.of", "img", r"heads\.f\.of: found 'img', expected a tower or an earlier head: \['image', "),
        ("heads.image", {"of": "text"}, r"heads\.image: a tower has the same name"),
        ("terms", {}, r"terms: expected at least one pair term"),
        ("terms.image-text.y", "h", r"terms\.image-text\.y: found 'h', expected one of the heads \["),
        ("terms.image-text.y", "f", "expected two different heads"),
        ("terms.image-text.weight", "1/0", r"terms\.image-text\.weight: .*a fraction of two integers.*found '1/0'"),
        ("terms.image-text.weight", "a/3", r"terms\.image-text\.weight: .*a fraction of two integers.*found 'a/3'"),
        ("deploy.text", "f", "is on the tower .image. of image; name one on a tower, or a cache, of text"),
        ("deploy.image", "g", "is on the tower .text. of text; name one on a tower, or a cache, of image"),
        ("duration.steps", 3, r"duration: found epochs, steps, expected exactly one of"),
        ("terms.image-third", None, r"towers: \['third'\] are used by no term"),
        ("heads.other", {"of": "f"}, r"heads: \['other'\] are used by no term"),
        ("data.tars", [], r"data\.tars: expected at least one"),
        ("data.datasets", {"a": {"tars": ["a.tar"]}}, "tars and datasets are both given"),
        ("data.crop_scale", 0.5, r"\['third'\] hold the embedding of the uncropped view only; set crop_scale: 1\.0"),
        ("towers.image.frozen", True, r"towers\.image\.frozen: .* name them by towers\.image\.init"),
        (
            "towers.text.share",
            {"tower": "third"},
            r"towers\.text\.share\.tower: found 'third', expected an image ",
        ),
        ("base", "other.yaml", r"base: Unexpected keyword"),
    ],
)
def test_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(changed(path, value))


def test_what_towers_read() -> None:
    """Whatever a tower is built of, the trainer asks these of it."""
    tree = changed("towers.captions", {"kind": "cache", "path": "d", "of": "text"})
    tree["heads"]["h_g"] = {"of": "captions"}
    tree["terms"]["third-captions"] = {"x": "h_f", "y": "h_g"}
    config = parse(tree)
    assert {name: (tower.of, tower.reads, tower.trained) for name, tower in config.towers.items()} == {
        "image": ("image", "images", True),
        "text": ("text", "tokens", True),
        "third": ("image", "rows", False),
        "captions": ("text", "rows", False),
    }
    assert config.towers_reading("rows") == ["third", "captions"]
    assert {"timm", "text", "cache"} <= TOWER_KINDS


def test_numbers_that_yaml_reads_as_text() -> None:
    assert parse(yaml.safe_load(yaml.safe_dump(THREE) + "optim: {lr: 1e-4}")).optim.lr == 1e-4


@pytest.mark.parametrize(("given", "weight"), [("1/3", 1 / 3), ("2/6", 1 / 3), (0.25, 0.25), ("0.25", 0.25), (2, 2.0)])
def test_weights_may_be_fractions(given: Any, weight: float) -> None:
    config = parse(changed("terms.image-text.weight", given))
    assert config.terms["image-text"].weight == weight
    assert parse(dump(config)) == config
    mixed = changed("data.tars", None)
    mixed["data"]["datasets"] = {"a": {"tars": ["a.tar"], "weight": given}}
    assert parse(mixed).data.datasets["a"].weight == weight


def write(path: Path, tree: dict[str, Any]) -> Path:
    """Write a config and return its path."""
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_overrides(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", THREE)
    config = load_config(file, ["optim.lr=3e-4", "data.tars=[x.tar, y.tar]", "engine.zero_stage=3"])
    assert (config.optim.lr, config.data.tars, config.engine.zero_stage) == (3e-4, ["x.tar", "y.tar"], 3)
    for wrong, message in [
        ("optim.lr", "expected key.path=value"),
        ("global_batch_size.x=1", "holds a value"),
        ("a=[", "not YAML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(file, [wrong])


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    third = "towers: {image: &vit {kind: timm, model: test_vit}, other: *vit}"
    file.write_text(yaml.safe_dump({key: value for key, value in THREE.items() if key != "towers"}) + third)
    with pytest.raises(ConfigError, match="'text'"):
        load_config(file)
    text = "towers.text={kind: text, width: 16, depth: 1, heads: 2}"
    heads = ["heads.h_f.of=other", "towers.other.model=test_vit2"]
    config = dump(load_config(file, [text, *heads]))
    assert config["towers"]["image"]["model"] == "test_vit"
    assert config["towers"]["other"]["model"] == "test_vit2"


def test_a_base_is_merged_below_the_file(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases" / "three.yaml", THREE | {"variants": {"faster": {"optim": {"lr": 1.0}}}})
    own = {
        "base": "bases/three.yaml",
        "duration": {"steps": 5},  # in place of the base's epochs
        "data": {"tars": ["b.tar"]},
        "towers": {"third": None, "text": {"depth": 2}},
        "heads": {"f_h": None, "h_f": None},
        "terms": {"image-third": None},
    }
    expected = copy.deepcopy(THREE)
    expected["duration"] = {"steps": 5}
    expected["data"]["tars"] = ["b.tar"]
    expected["towers"]["text"]["depth"] = 2
    for section, names in {"towers": ["third"], "heads": ["f_h", "h_f"], "terms": ["image-third"]}.items():
        for name in names:
            del expected[section][name]
    file = write(tmp_path / "run.yaml", own)
    assert load_config(file) == parse(expected)
    assert "base" not in dump(load_config(file))
    with pytest.raises(ConfigError, match="unknown variant 'faster'; its variants are: none"):
        load_config(file, variant="faster")


def test_a_tower_of_another_kind_replaces_that_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "three.yaml", THREE)
    cached = {"kind": "cache", "path": "cache"}
    file = write(tmp_path / "run.yaml", {"base": "three.yaml", "towers": {"image": cached}})
    expected = copy.deepcopy(THREE)
    expected["towers"]["image"] = cached
    assert load_config(file) == parse(expected)


def test_a_base_that_cannot_be_used(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", THREE)
    write(tmp_path / "second.yaml", {"base": "first.yaml"})
    for base, message in [
        ("second.yaml", r"base: second\.yaml itself has the base 'first\.yaml', but a base may not have one; choose"),
        ("no.yaml", r"no\.yaml: cannot be read as YAML"),
        (["first.yaml"], r"base: expected the path of a config, relative to this file, found \['first\.yaml'\]"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(write(tmp_path / "third.yaml", {"base": base}))


def test_variants_are_merged_over_the_file_and_below_overrides(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 0.5, "weight_decay": 0.0}, "terms": {"image-third": {"kind": "l2"}}}
    file = write(tmp_path / "run.yaml", THREE | {"variants": {"l2": changes, "none": {}}})
    assert load_config(file) == load_config(file, variant="none") == parse(THREE)
    config = load_config(file, ["optim.lr=0.25"], variant="l2")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (0.25, 0.0, (0.9, 0.98))
    assert (config.terms["image-third"].kind, config.terms["image-third"].y) == ("l2", "h_f")
    assert "variants" not in dump(config)
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown variant 'l1'; its variants are: l2, none"):
        load_config(file, variant="l1")


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["l2"], r"variants: expected a mapping from names to changes, found \['l2'\]"),
        ({"l2": "terms.image-third.kind=l2"}, r"variants\.l2: expected a mapping of keys, found 'terms"),
        ({"l2": {"base": "other.yaml"}}, r"base: Unexpected keyword"),
        ({16: {"embed_dim": 32}}, "expected a text as the name of a variant, found 16; quote it"),
    ],
)
def test_variants_that_cannot_be_used(variants: Any, message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", THREE | {"variants": variants})
    with pytest.raises(ConfigError, match=message):
        load_config(file, variant="l2")


@pytest.mark.parametrize("content", ["a: [", "- a\n- b\n", ""])
def test_file_that_is_no_config(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=str(file)):
        load_config(file)
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        load_config(tmp_path / "no.yaml")


def test_config_changes_name_the_leaves() -> None:
    found = config_changes(parse(THREE), parse(changed("optim.lr", 0.5)))
    assert [str(change) for change in found] == ["optim.lr: 0.001 -> 0.5"]


def test_durations() -> None:
    assert Duration(steps=7).in_steps(100, 32) == 7
    assert Duration(samples=1000).in_steps(100, 32) == 31
    assert Duration(epochs=2.5).in_steps(100, 32) == 8  # 2.5 x 3 complete batches


@pytest.mark.parametrize("file", RUNS, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_shipped_configs_are_valid(file: Path) -> None:
    config = load_config(file)
    assert str(file.relative_to(ROOT)) in file.read_text().split("\n\n")[0]  # how to run it
    assert config.output_dir.endswith(file.stem)


def keys(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each key of each section, as SECTION.KEY, with its JSON schema."""
    for section in [schema, *schema["$defs"].values()]:
        for key, value in section["properties"].items():
            yield f"{section['title']}.{key}", value


def test_every_key_has_a_description_and_is_in_the_reference() -> None:
    schema = TypeAdapter(TrainConfig).json_schema()
    page = config_reference()
    for name, value in keys(schema):
        section = schema["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else {}
        assert value.get("description") or section.get("description"), name
        assert f"\n- `{name.partition('.')[2]}` (" in page, name
    for section in schema["$defs"].values():
        assert " ".join(section["description"].split()) in " ".join(page.split()), section["title"]
    assert page.count("\n- `") == len(list(keys(schema))) + 2  # base and variants


def test_the_reference_in_docs_is_up_to_date() -> None:
    written = (ROOT / "docs/config.md").read_text()
    assert written == config_reference(), "run `make docs/config.md`"


def test_sections_of_the_reference() -> None:
    page = config_reference(["optim", "data"])
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "## `data`",
        "## `data.datasets.NAME`",
        "## `data.augment`",
        "## `optim`",
        "## `optim.param_groups`",
    ]
    with pytest.raises(ConfigError, match="--help-config: found optimizer, expected sections among duration, data, "):
        config_reference(["optimizer"])
