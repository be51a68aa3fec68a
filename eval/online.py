"""Online evaluation: retrieval on held-out tars while a run trains, on all ranks together."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, distributed

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.processes.world import World
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.eval.datasets.dataset import open_dataset
from threetowers.eval.datasets.dataset_config import DatasetConfig
from threetowers.eval.datasets.image_set import ImageReader
from threetowers.eval.encoders.cached_input import CachedInput, teachers_of
from threetowers.eval.encoders.embedding_store import Embeddings
from threetowers.eval.encoders.encoder import LoadOptions
from threetowers.eval.encoders.forward import forward_captions, forward_images
from threetowers.eval.encoders.image_source import ImageSource
from threetowers.eval.encoders.text_source import TextSource
from threetowers.eval.left_out import left_out_text
from threetowers.eval.metrics.recall import evaluate_retrieval
from threetowers.eval.tasks.retrieval import Gallery, captioned_part
from threetowers.eval.tasks.settings import RetrievalSettings
from threetowers.trainer.config import CacheTower, OnlineEvaluation, TrainConfig
from threetowers.trainer.export.trained_model import TrainedModel
from threetowers.trainer.model.model import TowerModel

logger = logging.getLogger(__name__)

REMEDY = "give it as evaluation.caches.{tower}"
LOGGED = ("text_to_image/recall@1", "text_to_image/recall@5", "image_to_text/recall@1", "image_to_text/recall@5")


class RetrievalEvaluator:
    """An evaluator for the training loop: recalls of the deployed embeddings on the run's held-out tars."""

    name = "retrieval"

    def __init__(self, config: TrainConfig, settings: OnlineEvaluation) -> None:
        """Read the held-out set.

        Raises:
            ManifestError: A deployed head stands on a cache, and there is none of the held-out tars.
            ValueError: The set holds nothing usable.
        """
        self.config = config
        self.settings = settings
        self.retrieval = RetrievalSettings(group_field=settings.group_field)
        held_out = DatasetConfig(
            name="held out",
            tars=list(settings.tars),
            captions=config.data.captions,
            caption_per_line=config.data.caption_per_line,
            image_member=config.data.image_member,
        )
        dataset = open_dataset(held_out, "retrieval", self.retrieval, ImageReader(config.data.max_pixels))
        part, _ = captioned_part(dataset.test, self.retrieval)
        self.data = part.data
        self.left_out = {reason: count for reason, count in part.left_out.items() if count}
        logger.info(
            "online evaluation: %d of %d images used; left out: %s",
            min(len(part.rows), settings.max_samples),
            len(part.rows),
            left_out_text(len(part.rows), self.left_out),
        )
        self.gallery = Gallery.of(part, self.retrieval)
        self.tokenizer = load_named_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        # No workers: the training's own run beside it, and a second set would have to be forked every time.
        self.options = LoadOptions(caches=settings.caches, workers=0, max_pixels=config.data.max_pixels)
        self.cached = self._cached_inputs()

    def every(self, samples: int, batch: int, steps: int) -> int:
        """Return after how many steps it is due again."""
        return self.settings.every.in_steps(samples, batch, steps)

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        """Return recalls in 0..1 of both directions, and how many images they are of; each rank embeds its share.

        Collective. `left_out/<reason>` is the number of images that could not be used.
        """
        manifests = {tower: cached.manifest for tower, cached in self.cached.items()}
        trained = TrainedModel(self.config, model, self.tokenizer, manifests)
        image_source = ImageSource(self.config, self.options, self.cached.get(trained.image_tower))
        text_source = TextSource(trained.tokens, self.cached.get(trained.text_tower))
        view = image_source.view(self.data)
        read_text = text_source.captions(self.data)

        # This rank's share of the images, with the captions of each.
        world = World.from_process_group()
        mine = slice(world.rank, self.settings.max_samples, world.size)
        images = self.gallery.images[mine]
        image_groups = self.gallery.groups[mine]
        captions: list[str] = []
        text_groups: list[str] = []
        for image, group in zip(images, image_groups, strict=True):
            for caption in image.captions[: self.retrieval.max_captions]:
                captions.append(caption)
                text_groups.append(group)

        @torch.inference_mode()
        def embed_images(views: Tensor) -> Tensor:
            return trained.encode_images(image_source.prepare(views))

        def embed_captions(batch: Sequence[str]) -> Tensor:
            return trained.encode_tokens(read_text(batch))

        options = self.options
        image_batches = list(forward_images(images, view, embed_images, options.batch_size, options.workers))
        text_batches = list(forward_captions(captions, embed_captions, options.batch_size))

        # Every rank scores all of them.
        image_ND, all_image_groups = _gather(image_batches, image_groups)
        text_MD, all_text_groups = _gather(text_batches, text_groups)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(all_image_groups))}
        metrics = evaluate_retrieval(
            image_ND,
            text_MD,
            torch.tensor([numbers[group] for group in all_image_groups]),
            torch.tensor([numbers[group] for group in all_text_groups]),
            device=trained.device,
        ).metrics()
        counts = {"images": float(len(all_image_groups)), "left_out": float(sum(self.left_out.values()))}
        for reason, count in self.left_out.items():
            counts[f"left_out/{reason.replace(' ', '_')}"] = float(count)
        return {name: metrics[name] for name in LOGGED} | counts

    def _cached_inputs(self) -> dict[str, CachedInput]:
        """Return what the deployed heads' cached towers take, by tower.

        Raises:
            ManifestError: There are no caches of the held-out tars. Whether they are built is asked when they are read.
        """
        manifests = {}
        for head in (self.config.deploy.image, self.config.deploy.text):
            tower = self.config.root_of(head)
            settings = self.config.towers[tower]
            if isinstance(settings, CacheTower):
                manifests[tower] = EmbeddingCache.open(settings.path).manifest
        teachers = teachers_of(self.config, manifests, self.options)
        found = {}
        for tower, manifest in manifests.items():
            cached = found[tower] = CachedInput(self.config, tower, manifest, teachers, self.options, REMEDY)
            cache = cached.cache()
            with cached.explained():
                for tar in self.data.tars:
                    cache.table.find(tar)
        return found


def _gather(batches: list[Embeddings], groups: list[str]) -> tuple[Embeddings, list[str]]:
    """Return the embeddings and groups of all ranks, in the order of the ranks. Collective."""
    parts: list[tuple[list[Embeddings], list[str]]] = [([], [])] * distributed.get_world_size()
    distributed.all_gather_object(parts, (batches, groups))
    all_batches: list[Embeddings] = []
    all_groups: list[str] = []
    for part_batches, part_groups in parts:
        all_batches += part_batches
        all_groups += part_groups
    return np.concatenate(all_batches), all_groups
