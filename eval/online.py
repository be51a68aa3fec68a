"""Retrieval while a run trains: a quick look at held-out tars, on all ranks together."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed

from threetowers.cache.webdataset.tar_index import expand, index_tar
from threetowers.cache.world import World
from threetowers.eval.datasets.evaluation_set import Floats, evaluation_set
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.forward import forward_captions, forward_pictures
from threetowers.eval.encoders.image_source import image_source
from threetowers.eval.metrics.recall import evaluate_retrieval
from threetowers.trainer.config import OnlineEvaluation, TrainConfig
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.run_folder import RunFolder
from threetowers.trainer.tokenizer import Tokenizer

SHOWN = ("text_to_image/recall@1", "text_to_image/recall@5", "image_to_text/recall@1", "image_to_text/recall@5")


class RetrievalEvaluator:
    """An evaluator for the training loop: recalls of the deployed embeddings on the run's `evaluate.tars`."""

    name = "retrieval"

    def __init__(self, run: TrainConfig, settings: OnlineEvaluation) -> None:
        """Reads the held-out set. Raises ValueError when it holds nothing usable."""
        self.run, self.settings = run, settings
        tars = [index_tar(path) for path in expand(settings.tars)]
        group = settings.group_field
        self.data = evaluation_set(
            tars,
            group_field=group,
            part_field=None,
            max_captions=5,
            max_pixels=run.data.max_pixels,
            caption_per_line=run.data.caption_per_line,
        )
        self.tokenizer = Tokenizer.load(run.data.tokenizer)

    def every(self, samples: int, batch: int, steps: int) -> int:
        """Return after how many steps it is due again."""
        return self.settings.every.in_steps(samples, batch, steps)

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        """Return recalls in 0..1 of both directions; each rank embeds its share. Collective."""
        manifests = RunFolder(Path(self.run.output_dir)).read_manifests()
        trained = TrainedModel(self.run, model, self.tokenizer, manifests)
        world = World.from_process_group()
        pictures = self.data.pictures[: self.settings.max_samples][world.rank :: world.size]
        captions = [caption for picture in pictures for caption in picture.captions]
        # No workers: the training's own are at work beside it, and a second set would have to be forked every time.
        loading = LoadOptions(workers=0, max_pixels=self.run.data.max_pixels)
        source = image_source(trained, trained.image_tower, self.data, loading)

        @torch.inference_mode()
        def forward(views: Tensor) -> Tensor:
            return model.encode_image({trained.image_tower: source.prepare(views).to(trained.device)})

        images = list(forward_pictures(pictures, source.view, forward, loading.batch_size, loading.workers))
        texts = list(forward_captions(captions, trained.encode_texts, loading.batch_size))
        groups = [picture.group for picture in pictures]
        owners = [picture.group for picture in pictures for _ in picture.captions]
        image_ND, text_MD, image_groups, text_groups = _joined(images, texts, groups, owners)
        names = {group: number for number, group in enumerate(dict.fromkeys(image_groups))}
        found = evaluate_retrieval(
            image_ND,
            text_MD,
            torch.tensor([names[group] for group in image_groups]),
            torch.tensor([names[group] for group in text_groups]),
            device=trained.device,
        ).metrics()
        return {name: found[name] for name in SHOWN}


def _joined(
    images: list[Floats], texts: list[Floats], groups: list[str], owners: list[str]
) -> tuple[Floats, Floats, list[str], list[str]]:
    """The parts of all ranks, one after the other."""
    parts: list[tuple[list[Floats], list[Floats], list[str], list[str]]] = [
        ([], [], [], [])
    ] * distributed.get_world_size()
    distributed.all_gather_object(parts, (images, texts, groups, owners))
    a, b, c, d = ([item for part in parts for item in part[k]] for k in range(4))
    return np.concatenate(a), np.concatenate(b), c, d  # type: ignore[return-value]
