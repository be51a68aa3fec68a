"""Our own runs and exports: an image head and a text head of a trained model."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from threetowers.cache.encoders.live import LiveTeachers
from threetowers.cache.encoders.tokenizers.tokenizer import Tokenizer
from threetowers.eval.datasets.image_set import EvalImage, ImageSet
from threetowers.eval.encoders.arithmetic import PrecisionName, arithmetic
from threetowers.eval.encoders.cached_input import CachedInput, teachers_of
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import Encoder, LoadOptions, ModelInfo, file_digest, joined_digests
from threetowers.eval.encoders.fingerprint import model_fingerprint
from threetowers.eval.encoders.forward import forward_captions, forward_images
from threetowers.eval.encoders.image_source import ImageSource
from threetowers.eval.encoders.text_source import TextInput, TextSource
from threetowers.trainer.config import TrainConfig, dump
from threetowers.trainer.export.trained_model import TrainedModel, load_model
from threetowers.trainer.model.model import clamp_log_scale
from threetowers.trainer.run.run_folder import RunFolder


class RunEncoder(Encoder):
    """The embeddings of two heads of a run, one on an image tower and one on a text tower; either may be cached."""

    def __init__(
        self,
        path: Path,
        trained: TrainedModel,
        teachers: LiveTeachers,
        image_head: str,
        text_head: str,
        options: LoadOptions,
    ) -> None:
        """Make an encoder of two heads of a run.

        Args:
            path: Folder of the run.
            trained: Its model.
            teachers: Those of its cached towers.
            image_head: A head on an image tower.
            text_head: A head on a text tower.
            options: How the run is evaluated.
        """
        self.path = path
        self.trained = trained
        self.teachers = teachers
        self.options = options
        self.image_head = image_head
        self.text_head = text_head
        self.image_tower = trained.config.root_of(image_head)
        self.text_tower = trained.config.root_of(text_head)
        cached = {
            tower: CachedInput(trained.config, tower, trained.manifests[tower], teachers, options)
            for tower in (self.image_tower, self.text_tower)
            if tower in trained.manifests
        }
        self.image = ImageSource(trained.config, options, cached.get(self.image_tower))
        self.text = TextSource(trained.tokens, cached.get(self.text_tower))
        self.device = options.torch_device()
        self.precision: PrecisionName = options.precision or trained.model.precision
        trained.model.to(self.device).set_precision(self.precision)
        self.dim = trained.model.widths[image_head]
        self.logit_scale = self._logit_scale()
        folder = RunFolder(path)
        digest = file_digest(folder.weights)
        if (image_head, text_head) != (trained.config.deploy.image, trained.config.deploy.text):
            digest = hashlib.sha256(f"{digest} {image_head} {text_head}".encode()).hexdigest()
        # What cached towers take: of which cache, and whether it is read
        rows = {name: (tower.evaluated_manifest.digest, tower.reads_rows) for name, tower in cached.items()}
        self.info = ModelInfo(
            name=path.resolve().name,
            digest=digest,
            step=int(json.loads(folder.summary.read_text())["steps"]) if folder.summary.exists() else None,
            precision=self.precision,
            preprocessing=f"{self.image}; captions: {self.text}" if self.text.cached else str(self.image),
            fingerprint=model_fingerprint(
                kind="run",
                weights=digest,
                parts=self._parts(),
                image_size=trained.config.data.image_size,
                tokenizer=trained.tokenizer.digest if trained.tokenizer else None,
                context_length=trained.config.data.context_length,
                rows=rows,
                scale=self.logit_scale,
                precision=self.precision,
            ),
            cache_manifest=joined_digests(*(digest for digest, _ in rows.values())),
            recipe=recipe_digest(trained.config),
            seed=trained.config.seed,
            tokenizer=_stated(trained.tokenizer),
        )

    @property
    def cached_towers(self) -> tuple[str, ...]:
        """The cached towers of the run."""
        return tuple(self.trained.manifests)

    def raw_image_batches(self, data: ImageSet, images: Sequence[EvalImage], features: bool) -> Iterator[Embeddings]:
        """Yield embeddings of the image head, or with `features` the output of its tower."""
        view = self.image.view(data)
        model = self.trained.model

        @torch.inference_mode()
        def forward(views: Tensor) -> Tensor:
            inputs = {self.image_tower: self.image.prepare(views).to(self.device, non_blocking=True)}
            with arithmetic(self.precision, self.device):
                if features:
                    return model.features(inputs, self.image_tower)
                return model.embed(inputs, [self.image_head])[self.image_head]

        return forward_images(images, view, forward, self.options.batch_size, self.options.workers)

    def raw_text_batches(self, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield embeddings of the text head."""
        return self._text_batches(captions, self.text.texts())

    def raw_caption_batches(self, data: ImageSet, captions: Sequence[str]) -> Iterator[Embeddings]:
        """Yield embeddings of the text head; a cached tower takes the rows of the captions."""
        return self._text_batches(captions, self.text.captions(data))

    def _text_batches(self, captions: Sequence[str], read: TextInput) -> Iterator[Embeddings]:
        @torch.inference_mode()
        def forward(batch: Sequence[str]) -> Tensor:
            inputs = {self.text_tower: read(batch).to(self.device)}
            with arithmetic(self.precision, self.device):
                return self.trained.model.embed(inputs, [self.text_head])[self.text_head]

        return forward_captions(captions, forward, self.options.batch_size)

    def _parts(self) -> dict[str, nn.Module]:
        """Return the towers and heads that the two heads stand on, and these, by name."""
        model = self.trained.model
        parts = {}
        for name in (self.image_head, self.text_head):
            while name in model.heads:
                parts[f"head {name}"] = model.heads[name]
                name = self.trained.config.heads[name].of
            parts[f"tower {name}"] = model.towers[name]
        return parts

    def _logit_scale(self) -> float:
        run = self.trained.config
        between = [t for t in run.terms.values() if {t.x, t.y} == {self.image_head, self.text_head}]
        scales = [term.scale for term in between if term.has_scale]
        if not scales:  # deployed heads that no such term trained together
            return 1.0
        log_scale = self.trained.model.log_scales[scales[0]].detach().float()
        return float(clamp_log_scale(log_scale, run.loss.scale_max).exp())


def _stated(tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else f"{tokenizer.name} (sha256 {tokenizer.digest})"


def recipe_digest(run: TrainConfig) -> str:
    """Return the digest of a run's config without seed and folder: equal for runs that differ in these alone."""
    tree = dump(run)
    del tree["seed"], tree["output_dir"]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def load_deployed_heads(path: Path, options: LoadOptions) -> RunEncoder:
    """Return the encoder of the deployed heads of a run or an export. Raises ValueError for a folder without one."""
    trained = load_model(path)
    teachers = teachers_of(trained.config, trained.manifests, options)
    return RunEncoder(path, trained, teachers, trained.config.deploy.image, trained.config.deploy.text, options)


def third_tower_heads(main: RunEncoder, tower: str) -> RunEncoder:
    """Return the encoder of the heads h_g on a cached tower and g_h on the text tower, found by their pair term.

    Args:
        main: The encoder of the run's deployed heads, with which it shares the model and the teachers.
        tower: The cached tower.

    Raises:
        ValueError: The run has no such tower, or no such term.
    """
    path = main.path
    run = main.trained.config
    known = [name for name in run.towers_reading("rows") if run.side_of(name) == "image"]
    if tower not in known:
        found = "is of text" if tower in run.towers_reading("rows") else "is none"
        raise ValueError(
            f"{path}: an ensemble needs a cached tower of images, whose embedding is mixed into that of the main image "
            f"tower; {tower!r} {found}; found {known or 'none'}"
        )
    text = run.root_of(run.deploy.text)
    for term in run.terms.values():
        for image_head, text_head in ((term.x, term.y), (term.y, term.x)):
            if run.root_of(image_head) == tower and run.root_of(text_head) == text:
                return RunEncoder(path, main.trained, main.teachers, image_head, text_head, main.options)
    raise ValueError(f"{path}: no term pairs the text tower with {tower!r}, so there is no embedding for an ensemble")
