"""A finished run, loaded for use: its model, its tokenizer, and what its caches promised."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from threetowers.cache.format.manifest import Manifest
from threetowers.trainer.config import CacheTower, TrainConfig, load
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.state_dict import load_distinct
from threetowers.trainer.run_folder import RunFolder
from threetowers.trainer.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """Embeds images and texts with the deployed heads of a run."""

    run: TrainConfig
    model: TowerModel
    tokenizer: Tokenizer
    manifests: dict[str, Manifest]  # of the cached towers the run was trained with, by tower

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "TrainedModel":
        """Return the model of a run's folder, in float32 and evaluation mode.

        Raises ValueError when the folder holds no finished run.
        """
        folder = RunFolder(Path(path))
        for needed in (folder.config, folder.weights, folder.tokenizer, folder.manifests):
            if not needed.exists():
                raise ValueError(
                    f"{folder.path} holds no finished run: {needed.name} is missing; finish it with `threetowers train`"
                )
        run = load(folder.config)
        tokenizer = Tokenizer.load(folder.tokenizer)
        manifests = folder.read_manifests()
        widths = {name: manifest.dim for name, manifest in manifests.items()}
        model = TowerModel(run, tokenizer.embedding_rows(run.data.vocab_size), widths)
        load_distinct(model, load_file(folder.weights))
        return cls(run, model.to(device, torch.float32).eval(), tokenizer, manifests)

    @property
    def image_tower(self) -> str:
        """The tower that the deployed image head stands on; a cached one in a LiT run."""
        return self.run.root_of(self.run.deploy.image)

    @property
    def text_tower(self) -> str:
        """The tower that the deployed text head stands on."""
        return self.run.root_of(self.run.deploy.text)

    @property
    def sees_cached_rows(self) -> bool:
        """Whether images reach the model as rows of a cache (LiT) and not as pictures."""
        return isinstance(self.run.towers[self.image_tower], CacheTower)

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Return unit-norm embeddings (b, dim) of pictures (b, 3, S, S) uint8; in a LiT run, of cached rows (b, D)."""
        return self.model.encode_image({self.image_tower: images.to(self.device)})

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Return unit-norm embeddings (len(captions), dim)."""
        return self.encode_tokens(self.tokenizer.encode(captions, self.run.data.context_length))

    @torch.inference_mode()
    def encode_tokens(self, tokens_bL: Tensor) -> Tensor:
        """Return unit-norm embeddings (b, dim) of rows of tokens."""
        return self.model.encode_text({self.text_tower: tokens_bL.to(self.device)})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
