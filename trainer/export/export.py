"""Export of a run's deployed model: in our own format, open_clip's, timm's or ONNX, verified by loading it again."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from threetowers.cache.storage.atomic import partial_path
from threetowers.trainer.config import dump
from threetowers.trainer.estimate.summary import num_parameters
from threetowers.trainer.export.model_card import ExportFormat, model_card
from threetowers.trainer.export.onnx_format import load_onnx, write_onnx
from threetowers.trainer.export.open_clip_format import load_open_clip, write_open_clip
from threetowers.trainer.export.timm_format import load_timm, write_timm
from threetowers.trainer.export.trained_model import TrainedModel, deployed_model, load_model
from threetowers.trainer.model.state_dict import deduplicated_state_dict
from threetowers.trainer.run.finished_run import finished_run_folder
from threetowers.trainer.run.run_folder import RunFolder

# Largest difference of two unit-norm embeddings, per element; other packages compute attention with other kernels.
TOLERANCE = {"threetowers": 0.0, "open_clip": 1e-5, "timm": 0.0, "onnx": 1e-4}


@dataclass(frozen=True)
class ExportResult:
    """Folder and number of parameters of an export, and how it differs from the run."""

    folder: Path
    parameters: int
    left_out: int  # parameters of the run that the deployed model does not need
    difference: float  # largest between embeddings of the run's model and of the export, loaded again


def export(
    run: str | Path,
    out: str | Path,
    form: ExportFormat = "threetowers",
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> ExportResult:
    """Write the deployed model of a finished run to a new folder, load it from there and compare embeddings.

    Args:
        run: Folder of the run, or its URL.
        out: Folder to write.
        form: `threetowers`: for `load_model`. `open_clip`: for open_clip's `local-dir:FOLDER`. `timm`: the image tower
            without its head, for timm's `local-dir:FOLDER`. `onnx`: a graph of each side, for ONNX Runtime.
        results: Metrics by evaluation, for the model card.

    Raises:
        ValueError: The run is not finished, the folder is not empty, the format cannot express the model, or
            embeddings differ by more than the format's tolerance.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one, or remove it")
    trained = load_model(run, precision="float32")  # in which differences are those of the formats
    source = finished_run_folder(run)
    deployed = deployed_model(trained)
    partial = partial_path(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        difference = WRITERS[form](deployed, source, partial)
        if not difference <= TOLERANCE[form]:
            remedy = ". Set norm_eps of the text tower: without it the tower has two, open_clip one"
            raise ValueError(
                f"{form}: loaded again, the model gives embeddings that differ by {difference:.1e}, more than "
                f"{TOLERANCE[form]:.0e}{remedy if form == 'open_clip' else ''}"
            )
        (partial / "README.md").write_text(model_card(deployed, source, form, results or {}))
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    parameters = num_parameters(deployed.model)
    return ExportResult(out, parameters, num_parameters(trained.model) - parameters, difference)


def _write_threetowers(deployed: TrainedModel, run: RunFolder, folder: Path) -> float:
    """Write our own format and return the largest difference of embeddings."""
    exported = RunFolder(folder)
    if deployed.tokenizer is not None:
        exported.write_tokenizer(deployed.tokenizer)
    exported.write_manifests(deployed.manifests)
    exported.config.write_text(yaml.safe_dump(dump(deployed.config), sort_keys=False))
    state = deduplicated_state_dict(deployed.model)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, exported.weights)
    if run.summary.exists():
        shutil.copyfile(run.summary, exported.summary)
    loaded = load_model(folder, precision="float32")
    images, tokens_bL = probe_inputs(deployed)
    return max(
        _max_difference(deployed.encode_images(images), loaded.encode_images(images)),
        _max_difference(deployed.encode_tokens(tokens_bL), loaded.encode_tokens(tokens_bL)),
    )


def _write_open_clip(deployed: TrainedModel, run: RunFolder, folder: Path) -> float:
    """Write open_clip's format and return the largest difference of embeddings."""
    write_open_clip(deployed, folder)
    encode_image, encode_text = load_open_clip(folder, deployed)
    images, tokens_bL = probe_inputs(deployed)
    return max(
        _max_difference(deployed.encode_images(images), F.normalize(encode_image(images), dim=-1)),
        _max_difference(deployed.encode_tokens(tokens_bL), F.normalize(encode_text(tokens_bL), dim=-1)),
    )


def _write_timm(deployed: TrainedModel, run: RunFolder, folder: Path) -> float:
    """Write timm's format and return the largest difference of features."""
    write_timm(deployed, folder)
    images, _ = probe_inputs(deployed)
    with torch.inference_mode():
        features_bw = deployed.model.towers[deployed.image_tower](images)
        return _max_difference(features_bw, load_timm(folder, deployed)(images))


def _write_onnx(deployed: TrainedModel, run: RunFolder, folder: Path) -> float:
    """Write graphs for ONNX Runtime and return the largest difference of embeddings, in batches of other sizes too."""
    images, tokens_bL = probe_inputs(deployed)
    write_onnx(deployed, {"image": images[:2], "text": tokens_bL[:2]}, folder)
    encode_image, encode_text = load_onnx(folder)
    return max(
        max(
            _max_difference(deployed.encode_images(images[:size]), encode_image(images[:size])),
            _max_difference(deployed.encode_tokens(tokens_bL[:size]), encode_text(tokens_bL[:size])),
        )
        for size in (1, len(images))
    )


WRITERS: dict[ExportFormat, Callable[[TrainedModel, RunFolder, Path], float]] = {
    "threetowers": _write_threetowers,
    "open_clip": _write_open_clip,
    "timm": _write_timm,
    "onnx": _write_onnx,
}


def probe_inputs(model: TrainedModel, samples: int = 5) -> tuple[Tensor, Tensor]:
    """Return inputs to compare models by: images of noise, and tokens (b, L); for cached towers rows of noise."""
    generator = torch.Generator().manual_seed(0)
    data = model.config.data
    if model.sees_cached_rows:
        images = torch.randn(samples, model.model.widths[model.image_tower], generator=generator)
    else:
        shape = (samples, 3, data.side, data.side)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if model.reads_cached_text or model.tokenizer is None:
        return images, torch.randn(samples, model.model.widths[model.text_tower], generator=generator)
    special = model.tokenizer.special
    tokens_bL = torch.randint(model.tokenizer.vocab_size, (samples, data.context_length), generator=generator)
    tokens_bL[tokens_bL == special.end] = (special.end + 1) % model.tokenizer.vocab_size
    for row in range(samples):  # captions of all lengths
        end = data.context_length - 1 - row % data.context_length
        tokens_bL[row, end] = special.end
        tokens_bL[row, end + 1 :] = special.pad
    return images, tokens_bL


def _max_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
