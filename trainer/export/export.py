"""Leaving: a run's deployed model in our own format, in open_clip's or in timm's, proved by loading it again."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from threetowers.trainer.config import dump
from threetowers.trainer.export.inference_model import deployed, parameters_left_out
from threetowers.trainer.export.model_card import Format, model_card
from threetowers.trainer.export.open_clip_format import load_open_clip, write_open_clip
from threetowers.trainer.export.timm_format import load_timm, write_timm
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.state_dict import distinct_state
from threetowers.trainer.run_folder import RunFolder
from threetowers.trainer.tokenizer import END, PAD

# Largest difference of two unit-norm embeddings, per element; the other formats compute attention by other kernels.
TOLERANCE = {"threetowers": 0.0, "open_clip": 1e-5, "timm": 0.0}


@dataclass(frozen=True)
class Exported:
    """What was written: `difference` is the largest between embeddings of this model and of the folder loaded again."""

    folder: Path
    parameters: int
    left_out: int
    difference: float


def export(
    run: str | Path,
    out: str | Path,
    form: Format = "threetowers",
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> Exported:
    """Write the deployed model of a finished run to a new folder, load it from there and compare embeddings.

    `threetowers` reads as a run does, with `TrainedModel.load`; `open_clip` by open_clip's `local-dir:FOLDER`; `timm`
    is the image tower before its head, by timm's `local-dir:FOLDER`. `results`: metrics by evaluation, for the model
    card. Raises ValueError when the run is not finished, the folder is not empty, the format cannot express the model,
    or embeddings differ.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; choose another folder, or remove it")
    trained, source = TrainedModel.load(run), RunFolder(Path(run))
    kept = deployed(trained)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        difference = WRITERS[form](kept, source, partial)
        if not difference <= TOLERANCE[form]:
            raise ValueError(
                f"{form}: loaded again, the model gives embeddings that differ by {difference:.1e}, more than "
                f"{TOLERANCE[form]:.0e}. Has the text tower a norm_eps? Without, it has two, and open_clip knows one"
            )
        (partial / "README.md").write_text(model_card(kept, source, form, results or {}))
        if out.exists():
            out.rmdir()
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, _parameters(kept), parameters_left_out(trained, kept), difference)


def _write_own(kept: TrainedModel, run: RunFolder, folder: Path) -> float:
    own = RunFolder(folder)
    shutil.copyfile(run.tokenizer, own.tokenizer)
    own.write_manifests(kept.manifests)
    own.config.write_text(yaml.safe_dump(dump(kept.run), sort_keys=False))
    save_file({name: tensor.contiguous() for name, tensor in distinct_state(kept.model).items()}, own.weights)
    if run.summary.exists():
        shutil.copyfile(run.summary, own.summary)
    again = TrainedModel.load(folder)
    images, tokens = probes(kept)
    return max(
        _difference(kept.encode_images(images), again.encode_images(images)),
        _difference(kept.encode_tokens(tokens), again.encode_tokens(tokens)),
    )


def _write_open_clip(kept: TrainedModel, run: RunFolder, folder: Path) -> float:
    write_open_clip(kept, folder)
    shutil.copyfile(run.tokenizer, folder / "tokenizer.model")
    encode_image, encode_text = load_open_clip(folder, kept)
    images, tokens = probes(kept)
    return max(
        _difference(kept.encode_images(images), F.normalize(encode_image(images), dim=-1)),
        _difference(kept.encode_tokens(tokens), F.normalize(encode_text(tokens), dim=-1)),
    )


def _write_timm(kept: TrainedModel, run: RunFolder, folder: Path) -> float:
    write_timm(kept, folder)
    images, _ = probes(kept)
    with torch.inference_mode():
        ours = kept.model.towers[kept.image_tower](images)
        return _difference(ours, load_timm(folder, kept)(images))


WRITERS: dict[Format, Callable[[TrainedModel, RunFolder, Path], float]] = {
    "threetowers": _write_own,
    "open_clip": _write_open_clip,
    "timm": _write_timm,
}


def probes(model: TrainedModel, samples: int = 5) -> tuple[Tensor, Tensor]:
    """Return inputs to compare models by: pictures of noise (or rows of it, for a cached tower), and token rows."""
    generator, data = torch.Generator().manual_seed(0), model.run.data
    shape = (samples, 3, data.image_size, data.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if model.sees_cached_rows:
        images = torch.randn(samples, model.model.widths[model.image_tower], generator=generator)
    tokens_bL = torch.randint(END + 1, model.tokenizer.vocab_size, (samples, data.context_length), generator=generator)
    for row in range(samples):  # captions of all lengths
        end = data.context_length - 1 - row % data.context_length
        tokens_bL[row, end], tokens_bL[row, end + 1 :] = END, PAD
    return images, tokens_bL


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _parameters(model: TrainedModel) -> int:
    return sum(p.numel() for p in model.model.parameters())
