"""A model card: what was trained, on what, towards which cached teachers, with what result."""

import json
from collections.abc import Iterator, Mapping
from typing import Literal

import yaml

from threetowers.trainer.config import CacheTower, ImageTower, dump, load
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.run_folder import RunFolder
from threetowers.trainer.tokenizer import END, PAD

Format = Literal["threetowers", "open_clip", "timm"]
LOADING: dict[Format, str] = {
    "threetowers": """from threetowers.trainer.export.trained_model import TrainedModel

model = TrainedModel.load("this folder")
images = model.encode_images(pixels)  # {images}
texts = model.encode_texts(["a caption", "another one"])  # unit norm: images @ texts.T are cosines""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:this folder")
# Words become tokens by tokenizer.model (SentencePiece): pieces, then {end}, then {pad} up to {context} tokens.""",
    "timm": """import timm

image_tower = timm.create_model("local-dir:this folder", pretrained=True)""",
}


def model_card(kept: TrainedModel, run: RunFolder, form: Format, results: Mapping[str, Mapping[str, float]]) -> str:
    """Return a card in Markdown for the deployed model of a run; `results` are metrics by evaluation."""
    return "\n\n".join(_sections(kept, run, form, results)) + "\n"


def _sections(
    kept: TrainedModel, run: RunFolder, form: Format, results: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    whole = load(run.config)
    size, dim = whole.data.image_size, kept.model.widths[whole.deploy.image]
    rows = f"rows of its cached teacher, (n, {kept.model.widths[kept.image_tower]})"
    images = rows if kept.sees_cached_rows else f"(n, 3, {size}, {size}) uint8"
    yield f"# {run.path.name}"
    yield f"Image and text embeddings of {dim} dimensions, trained by threetowers."
    loading = LOADING[form].format(images=images, end=END, pad=PAD, context=whole.data.context_length)
    yield f"```python\n{loading}\n```"
    towers = [f"- image: {_image(kept)}", f"- text: {kept.run.towers[kept.text_tower].kind} transformer"]
    terms = [f"- {name}: {t.weight:g} x {t.kind} of ({t.x}, {t.y})" for name, t in whole.terms.items()]
    yield "## Towers\n\n" + "\n".join(towers)
    yield f"## Trained by\n\n{whole.loss.kind}, batch {whole.global_batch_size:,}\n\n" + "\n".join(terms)
    yield "## Data\n\n" + "\n".join(f"- {tar}" for tar in whole.data.patterns)
    manifests = run.read_manifests()
    if manifests:
        lines = [
            f"- {name}: {c.backbone}, weights {c.weights} (sha256 {c.weights_digest}), {c.dim} features, "
            f"{c.preprocessing.input_size[0]} x {c.preprocessing.input_size[1]} pixels"
            for name, c in manifests.items()
        ]
        yield "## Cached teachers\n\n" + "\n".join(lines)
    for evaluation, metrics in results.items():
        yield f"## {evaluation}\n\n" + "\n".join(f"- {name}: {value:.4g}" for name, value in metrics.items())
    if run.summary.exists():
        numbers = json.loads(run.summary.read_text())
        yield "## Training\n\n" + "\n".join(f"- {name}: {value}" for name, value in numbers.items())
    yield f"## Config\n\n```yaml\n{yaml.safe_dump(dump(whole), sort_keys=False)}```"


def _image(kept: TrainedModel) -> str:
    tower = kept.run.towers[kept.image_tower]
    if isinstance(tower, CacheTower):
        return f"cached rows of {kept.manifests[kept.image_tower].backbone}"
    assert isinstance(tower, ImageTower)
    return f"{tower.model} of timm, {kept.run.data.image_size} pixels"
