"""A model card: what was trained, on which data, with which cached teachers, and with what result."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import yaml

from threetowers.cache.format.manifest import Manifest
from threetowers.cache.info import input_text
from threetowers.trainer.config import CacheTower, ImageTower, Term, TextTower, dump, load_config
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.run.run_folder import RunFolder

ExportFormat = Literal["threetowers", "open_clip", "timm", "onnx"]
LOADING: dict[ExportFormat, str] = {
    "threetowers": """from threetowers.trainer.export.trained_model import load_model

model = load_model("this folder")
images = model.encode_images({images}
texts = model.encode_{texts}
cosines = images @ texts.T  # both are of unit norm""",
    "open_clip": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("local-dir:this folder")
tokenizer = open_clip.get_tokenizer("local-dir:this folder")
model.eval()
texts = model.encode_text(tokenizer(["a caption", "another one"]), normalize=True)""",
    "timm": """import timm

image_tower = timm.create_model("local-dir:this folder", pretrained=True)""",
    "onnx": """import onnxruntime

# What the graphs take is in onnx_config.json; embeddings are of unit norm.
image_side = onnxruntime.InferenceSession("this folder/image.onnx")
text_side = onnxruntime.InferenceSession("this folder/text.onnx")""",
}
# How a model with a cached tower sees what is in no cache.
COMPOSED = """The {sides} side takes rows of {encoders}, whose weights are not in this folder. Where they are at
hand, the two together are the encoder `run:this folder`, by which caches are built as well:

```python
from threetowers.cache.encoders.names import load_frozen_encoder

encoder = load_frozen_encoder("run:this folder")
images = encoder.side("image").embed(pixels, "projected")  # uint8, by encoder.side("image").transform
texts = encoder.side("text").embed(["a caption", "another one"], "projected")
```"""


def model_card(
    deployed: TrainedModel, run: RunFolder, form: ExportFormat, results: Mapping[str, Mapping[str, float]]
) -> str:
    """Return a card in Markdown for the deployed model of a run; `results` are metrics by evaluation."""
    return "\n\n".join(_sections(deployed, run, form, results)) + "\n"


def _sections(
    deployed: TrainedModel, run: RunFolder, form: ExportFormat, results: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    config = load_config(run.config)  # of the run, with everything that trained the model
    yield f"# {run.path.name}"
    width = deployed.model.widths[config.deploy.image]
    yield f"Image and text embeddings of {width} dimensions, trained by threetowers."
    yield f"```python\n{_loading(deployed, form)}\n```"
    if form == "threetowers" and deployed.manifests:
        sides = {manifest.of: manifest.encoder for manifest in deployed.manifests.values()}
        encoders = " and ".join(dict.fromkeys(sides.values()))
        yield COMPOSED.format(sides=" and the ".join(sorted(sides)), encoders=encoders)
    yield f"## Towers\n\n- image: {_image_tower(deployed)}\n- text: {_text_tower(deployed)}"

    terms = _list(f"{name}: {_term(term)}" for name, term in config.terms.items())
    yield f"## Trained by\n\n{config.loss.kind}, batch {config.global_batch_size:,}\n\n{terms}"
    yield f"## Data\n\n{_list(config.data.patterns)}"
    manifests = run.read_manifests()
    if manifests:
        yield f"## Cached teachers\n\n{_list(_teacher(name, manifest) for name, manifest in manifests.items())}"

    for evaluation, metrics in results.items():
        yield f"## {evaluation}\n\n{_list(f'{name}: {value:.4g}' for name, value in metrics.items())}"
    if run.summary.exists():
        summary = json.loads(run.summary.read_text())
        yield f"## Training\n\n{_list(f'{name}: {value}' for name, value in summary.items())}"
    yield f"## Config\n\n```yaml\n{yaml.safe_dump(dump(config), sort_keys=False)}```"


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _loading(deployed: TrainedModel, form: ExportFormat) -> str:
    """Return the Python lines that load the export."""
    data = deployed.config.data
    widths = deployed.model.widths
    texts = 'texts(["a caption", "another one"])'
    if deployed.sees_cached_rows:
        images = f"image_rows)  # of the cached teacher, (n, {widths[deployed.image_tower]})"
    else:
        images = f"pixels)  # (n, 3, {data.side}, {data.side}) uint8"
    if deployed.reads_cached_text:
        texts = f"tokens(text_rows)  # of the cached teacher, (m, {widths[deployed.text_tower]})"
    return LOADING[form].format(images=images, texts=texts)


def _term(term: Term) -> str:
    taught = f", taught by {', '.join(term.teachers)}" if term.teachers else ""
    return f"{term.weight:g} x {term.kind} of ({term.x}, {term.y}){taught}"


def _teacher(name: str, manifest: Manifest) -> str:
    return (
        f"{name}: {manifest.encoder}, weights {manifest.weights} (sha256 {manifest.weights_digest}), {manifest.dim} "
        f"{manifest.feature} features, {input_text(manifest)}"
    )


def _image_tower(deployed: TrainedModel) -> str:
    tower = deployed.config.towers[deployed.image_tower]
    if isinstance(tower, CacheTower):
        return _cached(deployed.manifests[deployed.image_tower])
    model = f"{tower.model} of timm" if isinstance(tower, ImageTower) else tower.description
    return f"{model}, {deployed.config.data.side} pixels"


def _text_tower(deployed: TrainedModel) -> str:
    tower = deployed.config.towers[deployed.text_tower]
    if isinstance(tower, CacheTower):
        return _cached(deployed.manifests[deployed.text_tower])
    return "text transformer" if isinstance(tower, TextTower) else tower.description


def _cached(manifest: Manifest) -> str:
    return f"cached rows of {manifest.encoder}, {manifest.feature}: {input_text(manifest)}"
