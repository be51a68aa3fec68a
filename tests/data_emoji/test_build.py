"""The parts of the emoji builder that need neither npm nor a rasteriser."""

import importlib
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
CODES = [f"{0x1F600 + i:X}" for i in range(400)]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The builder's module named by the test's parameter; the script's folder is on the path as when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param)


def on(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [name], indirect=True)


@on("captions")
def test_captions_open_with_the_label_and_drop_noise(module: ModuleType) -> None:
    keywords = ["flag_peru", "pe", ":)", "nation", "islander\xa0flag", "blue-square", "peruvian"]
    found = module.captions("flag: Peru", ["PE", "flag"], keywords)
    assert found == ["flag: Peru", "flag of Peru", "flag of Peru: nation, peruvian"]


@on("captions")
def test_captions_with_the_same_words_count_as_one(module: ModuleType) -> None:
    assert module.captions("man: bald", ["bald", "man"], []) == ["man: bald"]


@on("captions")
def test_a_shared_caption_leaves_both_concepts_but_a_label_stays(module: ModuleType) -> None:
    texts = {"A": ["cat", "pet, animal"], "B": ["dog", "animal, pet", "cat"]}
    assert module.without_shared(texts) == ({"A": ["cat"], "B": ["dog"]}, 3)
    with pytest.raises(ValueError, match=r"labels must be unique.*cat"):
        module.without_shared({"A": ["cat"], "B": ["Cat"]})


@on("splits")
def test_look_alikes_found_later_never_move_a_concept(module: ModuleType) -> None:
    pairs = [(CODES[i], CODES[i * 7 % 400]) for i in range(1, 200, 3)]
    before, after = module.plan(CODES, []), module.plan(CODES, pairs)
    assert set(before.values()) == {"train", "val", "test"}
    assert {code for code in CODES if after[code] not in (before[code], "dropped")} == set()
    assert any(split == "dropped" for split in after.values())


@on("splits")
def test_no_held_out_concept_keeps_a_look_alike(module: ModuleType) -> None:
    pairs = [(CODES[i], CODES[i + 1]) for i in range(0, 398, 2)] + [(CODES[0], CODES[2]), (CODES[2], CODES[4])]
    plan = module.plan(CODES, pairs)
    kept = [(plan[a], plan[b]) for a, b in pairs if "dropped" not in (plan[a], plan[b])]
    assert kept
    assert set(kept) == {("train", "train")}


@on("splits")
def test_alike_pairs_equal_a_plain_comparison(module: ModuleType) -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(20, 230, (3, 128, 128, 3))
    # "a+3" and "a-5" differ from "a" by 3 and 5 grey levels everywhere, on either side of ALIKE_RMS.
    arrays = {"a": base[0], "a+3": base[0] + 3, "a-5": base[0] - 5, "b": base[1], "b again": base[1], "c": base[2]}
    images = {name: Image.fromarray(array.astype(np.uint8)) for name, array in arrays.items()}
    assert module.alike_pairs(images) == [("a", "a+3"), ("b", "b again")]


@on("styles")
def test_a_name_that_fits_two_concepts_is_left_out(module: ModuleType) -> None:
    icons = {
        "prefix": "x",
        "width": 8,
        "height": 8,
        "icons": {"bat": {"body": "<path/>"}, "fox": {"body": "<path/>"}},
        "aliases": {"bat-game": {"parent": "bat"}, "fox-left": {"parent": "fox", "rotate": 1}},
    }
    files = {"icons.json": json.dumps(icons).encode(), "chars.json": b"{}"}
    labels = {"1F987": "bat", "1F3CF": "bat: game", "1F98A": "fox"}
    drawn, ambiguous = module.drawings(module.STYLES["noto-v1"], files, labels)
    assert (list(drawn), ambiguous) == (["1F98A"], ["1F987", "1F3CF"])
    with pytest.raises(ValueError, match=r"fox-left.*rotate"):
        module.iconify_svg(icons, "fox-left")


@on("styles")
def test_webp_sources_are_scaled_and_centred_on_white(module: ModuleType) -> None:
    stream = io.BytesIO()
    Image.new("RGBA", (256, 128), (255, 0, 0, 255)).save(stream, "WEBP", lossless=True)
    image = module.render(stream.getvalue())
    assert (image.size, image.mode) == ((128, 128), "RGB")
    assert [image.getpixel((64, y)) for y in (31, 32, 95, 96)] == [(255,) * 3, (255, 0, 0), (255, 0, 0), (255,) * 3]


@on("packages")
def test_a_package_is_read_without_following_its_paths(module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "evil.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, kind in (("package/../../icons.json", tarfile.REGTYPE), ("package/icons.json", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    assert module.read(path, lambda name: name == "icons.json") == {}
    assert list(tmp_path.iterdir()) == [path]


@on("packages")
def test_other_bytes_than_the_pinned_are_refused(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"  # stands for a registry that serves another tarball under the same version
    npm.write_text(f"#!/bin/sh\necho changed > {tmp_path}/{module.TWEMOJI.tarball}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match=rf"twemoji@1\.2\.5: SHA-256 is \w+, expected {module.TWEMOJI.sha256}"):
        module.fetch(module.TWEMOJI, tmp_path)
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 3\n")
    with pytest.raises(ValueError, match="failed with 3: no network"):
        module.fetch(module.TWEMOJI, tmp_path)
