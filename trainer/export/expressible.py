"""What can leave to what, and begin from what; `python -m threetowers.trainer.export.expressible` prints the tables.

Of the table of formats each row is a config with one property; each cell is the answer of the check by which an export
of it is refused. The table of beginnings holds what `init` of a tower is checked by.
"""

from collections.abc import Callable
from typing import Any

from threetowers.trainer.config import TrainConfig, parse
from threetowers.trainer.export.model_card import ExportFormat
from threetowers.trainer.export.open_clip_format import open_clip_reasons
from threetowers.trainer.export.timm_format import timm_reasons
from threetowers.trainer.model.initial.initial_weights import BEGINNINGS

Tree = dict[str, Any]
IMAGE: Tree = {"kind": "timm", "model": "vit_small_patch16_224"}
TEXT: Tree = {"kind": "text", "width": 512, "depth": 8, "heads": 8, "causal": True}
LINEAR: Tree = {}
MLP: Tree = {"kind": "mlp", "hidden": 1024}
CACHE: Tree = {"kind": "cache", "path": "cache"}
CLIP_IMAGE: Tree = {"kind": "open_clip", "of": "image", "model": "ViT-B-32"}
CLIP_TEXT: Tree = {"kind": "open_clip", "of": "text", "model": "ViT-B-32"}
BERT: Tree = {"kind": "hf", "of": "text", "config": {"model_type": "bert"}}
NO_HEAD: Tree = {"kind": "none"}
# The property: image tower, text tower, image head, text head.
CASES: dict[str, tuple[Tree, Tree, Tree, Tree]] = {
    "causal text pooled at the end token, linear heads": (IMAGE, TEXT, LINEAR, LINEAR),
    "two-way text without a mask, pooled at the last position": (
        IMAGE,
        TEXT | {"causal": False, "mask_padding": False, "pool": "last"},
        LINEAR,
        LINEAR,
    ),
    "two-way text that masks padding (the default)": (IMAGE, TEXT | {"causal": False}, LINEAR, LINEAR),
    "text pooled by the mean": (IMAGE, TEXT | {"pool": "mean"}, LINEAR, LINEAR),
    "image head: mlp, one GELU layer of twice `embed_dim`": (IMAGE, TEXT, MLP, LINEAR),
    "image head: any other mlp": (IMAGE, TEXT, MLP | {"depth": 2}, LINEAR),
    "text head: mlp": (IMAGE, TEXT, LINEAR, MLP),
    "timm model with `args`": (IMAGE | {"args": {"img_size": 192}}, TEXT, LINEAR, LINEAR),
    "specialised image tower (MS-CLIP-S)": (IMAGE | {"specialize": {}}, TEXT, LINEAR, LINEAR),
    "cached image tower (LiT)": (CACHE, TEXT, LINEAR, LINEAR),
    "cached text tower": (IMAGE, CACHE | {"of": "text"}, LINEAR, LINEAR),
    "both towers of open_clip, heads of kind none": (CLIP_IMAGE, CLIP_TEXT, NO_HEAD, NO_HEAD),
    "both towers of open_clip, a linear head on one": (CLIP_IMAGE, CLIP_TEXT, LINEAR, NO_HEAD),
    "image tower of open_clip, our text transformer": (CLIP_IMAGE, TEXT, NO_HEAD, LINEAR),
    "text tower of transformers": (IMAGE, BERT, LINEAR, LINEAR),
}
REASONS: dict[ExportFormat, Callable[[TrainConfig], list[str]]] = {
    "threetowers": lambda config: [],  # the format holds the config itself
    "onnx": lambda config: [],  # a graph holds what was computed, whatever it is; a cached side takes its rows
    "open_clip": open_clip_reasons,
    "timm": timm_reasons,
}


def case_config(image: Tree, text: Tree, image_head: Tree, text_head: Tree) -> TrainConfig:
    """Return a config of these towers and heads."""
    data: Tree = {"tars": ["0.tar"]}
    if image["kind"] != "cache":
        data["image_size"] = 224
    if text["kind"] != "cache":
        data["tokenizer"] = "tokenizer.model"
    return parse(
        {
            "output_dir": "run",
            "global_batch_size": 8,
            "duration": {"steps": 1},
            "embed_dim": 512,
            "data": data,
            "towers": {"image": image, "text": text},
            "heads": {"f": {"of": "image"} | image_head, "g": {"of": "text"} | text_head},
            "terms": {"image-text": {"x": "f", "y": "g"}},
            "deploy": {"image": "f", "text": "g"},
        }
    )


def formats_table() -> str:
    """Return the table in Markdown: for each property yes, or no and why."""
    lines = [f"| | {' | '.join(f'`{form}`' for form in REASONS)} |", f"|---|{'---|' * len(REASONS)}"]
    for name, case in CASES.items():
        config = case_config(*case)
        cells = [_cell(reasons(config)) for reasons in REASONS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def beginnings_table() -> str:
    """Return the table in Markdown: what `init` of a tower may be, by its kind."""
    sources = list(dict.fromkeys(source for known in BEGINNINGS.values() for source in known))
    lines = [f"| `init` | {' | '.join(f'kind `{kind}`' for kind in BEGINNINGS)} |", f"|---|{'---|' * len(BEGINNINGS)}"]
    for source in sources:
        named = source if source == "a file" else f"`{source}`"
        cells = ["yes" if source in known else "no" for known in BEGINNINGS.values()]
        lines.append(f"| {named} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(reasons: list[str]) -> str:
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


if __name__ == "__main__":
    print(f"{formats_table()}\n\n{beginnings_table()}")
