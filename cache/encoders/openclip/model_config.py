"""The config of an open_clip model, read without building the model: its towers, and how it takes images."""

import difflib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from threetowers.cache.format.manifest import Side

LOCAL = "local-dir:"
HUB = "hf-hub:"
SOURCES = (HUB, LOCAL)  # prefixes of names, before a colon that separates nothing
CONFIG = "open_clip_config.json"
SECTIONS = ("embed_dim", "vision_cfg", "text_cfg")  # what every model config has
# Keys that say nothing of what a tower makes of its weights, or whose effect shows in their shapes.
ASIDE = {
    *("image_size", "context_length", "vocab_size", "output_tokens"),
    *("patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained", "hf_model_pretrained"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
}
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # as open_clip's tags and folders state it


@dataclass(frozen=True)
class OpenClipConfig:
    """What a model of open_clip is built from.

    Attributes:
        model: open_clip's `model_cfg`: `embed_dim`, `vision_cfg`, `text_cfg` and some more.
        preprocessing: As far as it is stated with the model: mean, std, interpolation, resize_mode.
    """

    model: dict[str, Any]
    preprocessing: dict[str, Any]

    @property
    def vision(self) -> dict[str, Any]:
        """The keys of the image tower."""
        section: dict[str, Any] = self.model["vision_cfg"]
        return section

    @property
    def text(self) -> dict[str, Any]:
        """The keys of the text tower."""
        section: dict[str, Any] = self.model["text_cfg"]
        return section

    @property
    def is_custom(self) -> bool:
        """Whether the text tower is a module of its own (`text.*`), as it is in all models but CLIP itself."""
        return bool(self.model.get("custom_text")) or "hf_model_name" in self.text

    @property
    def pooling(self) -> str:
        """How the text tower makes one vector of a caption."""
        if self.text.get("hf_model_name"):
            return str(self.text.get("hf_pooler_type", "mean_pooler"))
        return "cls_emb" if self.text.get("embed_cls") else str(self.text.get("pool_type", "argmax"))

    @property
    def sees_padding(self) -> bool:
        """Whether the embedding of a caption depends on how far it is padded.

        It does not where a causal mask hides what is behind the token that is pooled.
        """
        hidden = not self.text.get("no_causal_mask") and not self.text.get("hf_model_name")
        return not (hidden and self.pooling in ("argmax", "eos", "first"))


def read_open_clip_config(name: str, changes: Mapping[str, Any] | None = None) -> OpenClipConfig:
    """Return the config of a model.

    Args:
        name: A model of open_clip, `hf-hub:ORG/NAME`, a folder that open_clip saved a model to (also as
            `local-dir:FOLDER`), or a JSON file: its `open_clip_config.json`, or a model config alone.
        changes: Keys of `model_cfg` with other values; those of a section are merged into it. Where they are a whole
            config, nothing is read.

    Raises:
        ValueError: There is no such model, file or folder, or it holds no model config; or open_clip is needed to find
            it, and is not installed.
    """
    if changes is not None and is_whole(changes):
        return OpenClipConfig(dict(changes), {})
    tree = _read(name)
    model = tree.get("model_cfg", tree)
    missing = [key for key in SECTIONS if not isinstance(model, dict) or key not in model]
    if missing:
        raise ValueError(f"open_clip:{name}: expected a model config, found no {' and no '.join(missing)} in it")
    stated = tree.get("preprocess_cfg", {}) if "model_cfg" in tree else {}
    preprocessing = {key: stated[key] for key in PREPROCESSING if stated.get(key) is not None}
    return OpenClipConfig(_merged(model, changes or {}), preprocessing)


def is_whole(config: Mapping[str, Any]) -> bool:
    """Return whether some keys of `model_cfg` are all that a model is built from."""
    return all(key in config for key in SECTIONS)


def is_in_package(name: str) -> bool:
    """Return whether a name is one of open_clip's own models, whose config is in its package."""
    return model_folder(name) is None and not name.endswith(".json") and not name.startswith(HUB)


def model_folder(name: str) -> Path | None:
    """Return the folder that a name stands for, as FOLDER or `local-dir:FOLDER`; None for other names."""
    if name.startswith(LOCAL):
        return Path(name.removeprefix(LOCAL))
    return Path(name) if Path(name).is_dir() else None


def unknown_model(name: str) -> ValueError:
    """Return the error for a name that is neither a folder nor known to open_clip."""
    import open_clip

    close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    return ValueError(
        f"open_clip:{name}: no folder, and unknown to open_clip {open_clip.__version__}; close: {close or 'none'}; a "
        "model of the hub is open_clip:hf-hub:ORG/NAME"
    )


def other_architecture(ours: OpenClipConfig, theirs: OpenClipConfig, side: Side) -> list[str]:
    """Return how the towers of one side of two models differ, but for their sizes of images, captions and vocabulary.

    Not all of it shows in the shapes of weights: activation functions, heads, masks and pooling do not.
    """
    import open_clip

    section, keys = ("vision_cfg", open_clip.CLIPVisionCfg) if side == "image" else ("text_cfg", open_clip.CLIPTextCfg)
    mine, other = (asdict(keys(**config.model[section])) for config in (ours, theirs))
    differ = [
        f"{section}.{key} is {mine[key]}, in the model of the weights {other[key]}"
        for key in mine
        if key not in ASIDE and mine[key] != other[key]
    ]
    if bool(ours.model.get("quick_gelu")) != bool(theirs.model.get("quick_gelu")):
        gelus = [bool(config.model.get("quick_gelu")) for config in (ours, theirs)]
        differ.append(f"quick_gelu is {gelus[0]}, in the model of the weights {gelus[1]}")
    return differ


def needs_quick_gelu(name: str, tag: str | None) -> bool:
    """Return whether the weights of a pretrained tag need QuickGELU where the config of the model has GELU.

    As `ViT-B-32:openai` does. open_clip itself only warns, and computes with GELU.
    """
    import open_clip

    if tag is None or name.startswith(SOURCES):
        return False
    stated = open_clip.get_pretrained_cfg(name, tag) or {}
    return bool(stated.get("quick_gelu")) and not (open_clip.get_model_config(name) or {}).get("quick_gelu")


def tag_preprocessing(name: str, tag: str) -> dict[str, Any]:
    """Return how the images of a pretrained tag of a model are preprocessed, as far as open_clip states it."""
    import open_clip

    config = open_clip.get_pretrained_cfg(name, tag)
    return {key: config[key] for key in PREPROCESSING if config.get(key) is not None}


def default_preprocessing(name: str, config: OpenClipConfig) -> dict[str, Any]:
    """Return how images are preprocessed for a model whose weights do not say it.

    It is what is stated with the model; else that on which all pretrained models of its name agree; else open_clip's
    default, that of CLIP.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    found = {key: getattr(default, key) for key in PREPROCESSING}
    tags = open_clip.list_pretrained_tags_by_model(name)
    stated = [tag_preprocessing(name, tag) for tag in tags]
    if stated and all(one == stated[0] for one in stated):
        found |= stated[0]
    return found | config.preprocessing


def _read(name: str) -> dict[str, Any]:
    """Return the JSON that describes a model."""
    folder = model_folder(name)
    if folder is not None:
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"open_clip:{name}: expected a folder that open_clip saved a model to, found no {CONFIG} in it"
            )
        return _json(folder / CONFIG)
    if name.endswith(".json"):
        return _json(Path(name))
    require_open_clip(name)
    if name.startswith(HUB):
        return _json(_hub_file(name.removeprefix(HUB)))

    # From the file, as the import of open_clip takes seconds; models that were added to it are known to itself alone.
    known = name.replace("/", "-")
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "model_configs" / f"{known}.json"
    if path.is_file():
        return _json(path)
    import open_clip

    added: dict[str, Any] | None = open_clip.get_model_config(known)
    if added is None:
        raise unknown_model(known)
    return added


def require_open_clip(name: str) -> None:
    """Raise ValueError if open_clip is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"open_clip:{name}: open_clip not found: pip install 'threetowers[open_clip]'")


@cache
def _hub_file(repository: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_hf

    from threetowers.cache.encoders.weights_file import one_line  # imports torch, which a config needs not

    try:
        return Path(download_pretrained_from_hf(repository, filename=CONFIG))
    except Exception as error:  # hub, network and file system each raise their own kinds
        raise ValueError(
            f"open_clip:{HUB}{repository}: its {CONFIG} cannot be had: {one_line(error)}; without a connection, "
            "download its files and name their folder instead"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected the config of a model of open_clip, found a {type(tree).__name__}")
    return tree


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of both; where both have a key, that of `above` counts."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
