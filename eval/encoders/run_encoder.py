"""Our own runs and exports: a pair of heads on an image side and a text side."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from threetowers.eval.datasets.evaluation_set import EvaluationSet, Floats, Picture
from threetowers.eval.encoders.encoder import LoadOptions, ModelInfo, file_digest
from threetowers.eval.encoders.forward import forward_captions, forward_pictures
from threetowers.eval.encoders.image_source import image_source, view_of
from threetowers.trainer.config import CacheTower, TrainConfig, dump
from threetowers.trainer.export.trained_model import TrainedModel, load_model
from threetowers.trainer.model.model import clamp_log_scale
from threetowers.trainer.run_folder import RunFolder


class RunTower:
    """The embeddings of two heads of a run, one on what an image gives and one on the text tower."""

    sees_text = True

    def __init__(
        self, path: Path, trained: TrainedModel, image_head: str, text_head: str, loading: LoadOptions
    ) -> None:
        self.trained, self.loading = trained, loading
        self.image_head, self.text_head = image_head, text_head
        self.image_tower = trained.config.root_of(image_head)
        self.device = loading.torch_device()
        trained.model.to(self.device, getattr(torch, loading.precision))
        self.dim = self._embed_text(["a"]).shape[1]
        self.logit_scale = self._logit_scale()
        folder = RunFolder(path)
        digest = file_digest(folder.weights)
        if (image_head, text_head) != (trained.config.deploy.image, trained.config.deploy.text):
            digest = hashlib.sha256(f"{digest} {image_head} {text_head}".encode()).hexdigest()
        manifest = trained.manifests.get(self.image_tower)
        self.facts = ModelInfo(
            name=path.resolve().name,
            digest=digest,
            step=int(json.loads(folder.summary.read_text())["steps"]) if folder.summary.exists() else None,
            precision=loading.precision,
            preprocessing=view_of(trained, self.image_tower),
            cache_manifest=manifest.digest if manifest else None,
            recipe=recipe_of(trained.config),
            seed=trained.config.seed,
        )

    def image_batches(self, data: EvaluationSet, pictures: Sequence[Picture], raw: bool) -> Iterator[Floats]:
        source = image_source(self.trained, self.image_tower, data, self.loading)
        tower = self.trained.model.towers[self.image_tower]

        @torch.inference_mode()
        def forward(views: Tensor) -> Tensor:
            inputs = source.prepare(views).to(self.device, non_blocking=True)
            if raw:
                features: Tensor = tower(inputs)
                return features
            return self.trained.model.embed({self.image_tower: inputs}, [self.image_head])[self.image_head]

        return forward_pictures(pictures, source.view, forward, self.loading.batch_size, self.loading.workers)

    def text_batches(self, captions: Sequence[str]) -> Iterator[Floats]:
        return forward_captions(captions, self._embed_text, self.loading.batch_size)

    @torch.inference_mode()
    def _embed_text(self, captions: Sequence[str]) -> Tensor:
        tower = self.trained.config.root_of(self.text_head)
        tokens_bL = self.trained.tokenizer.encode(captions, self.trained.config.data.context_length).to(self.device)
        return self.trained.model.embed({tower: tokens_bL}, [self.text_head])[self.text_head]

    def _logit_scale(self) -> float:
        run = self.trained.config
        scales = [t.scale for t in run.terms.values() if {t.x, t.y} == {self.image_head, self.text_head}]
        if not scales:  # deployed heads that no term trained together
            return 1.0
        log_scale = self.trained.model.log_scales[scales[0]].detach().float()
        return float(clamp_log_scale(log_scale, run.loss.scale_max).exp())


def recipe_of(run: TrainConfig) -> str:
    """Digest of a run's config without its seed and its folder."""
    tree = dump(run)
    del tree["seed"], tree["output_dir"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def main_pair(path: Path, loading: LoadOptions) -> RunTower:
    """The deployed heads of a run's or export's folder. Raises ValueError when it holds no finished model."""
    trained = load_model(path)
    return RunTower(path, trained, trained.config.deploy.image, trained.config.deploy.text, loading)


def third_pair(path: Path, tower: str, loading: LoadOptions) -> RunTower:
    """The heads h_g on a cached tower and g_h on the text tower, found by the term that pairs them.

    Raises ValueError for a run that has no such tower, or no such term.
    """
    trained = load_model(path)
    run = trained.config
    if not isinstance(run.towers.get(tower), CacheTower):
        known = [name for name, config in run.towers.items() if isinstance(config, CacheTower)]
        raise ValueError(f"{path}: mixing needs a cached tower, {tower!r} is none; found {known or 'none'}")
    text = run.root_of(run.deploy.text)
    for term in run.terms.values():
        for image_head, text_head in ((term.x, term.y), (term.y, term.x)):
            if run.root_of(image_head) == tower and run.root_of(text_head) == text:
                return RunTower(path, trained, image_head, text_head, loading)
    raise ValueError(f"{path}: no term pairs the text tower with {tower!r}, so there is no embedding to mix in")
