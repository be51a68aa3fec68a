"""A finished run, loaded for use: its model, its tokenizer, and what its caches promised."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from threetowers.cache.contract import Contract
from threetowers.trainer.config import CacheTower, Run, load
from threetowers.trainer.folder import RunFolder
from threetowers.trainer.tokenizer import Tokenizer
from threetowers.trainer.towers.model import TowerModel
from threetowers.trainer.weights import load_distinct


@dataclass(frozen=True)
class TrainedModel:
    """Embeds images and texts with the deployed heads of a run."""

    run: Run
    model: TowerModel
    tokenizer: Tokenizer
    contracts: dict[str, Contract]  # of the cached towers the run was trained with, by tower

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "TrainedModel":
        """Return the model of a run's folder, in float32 and evaluation mode.

        Raises ValueError when the folder holds no finished run.
        """
        folder = RunFolder(Path(path))
        for needed in (folder.config, folder.weights, folder.tokenizer, folder.contracts):
            if not needed.exists():
                raise ValueError(
                    f"{folder.path} holds no finished run: {needed.name} is missing; finish it with `threetowers train`"
                )
        run = load(folder.config)
        tokenizer = Tokenizer.load(folder.tokenizer)
        contracts = folder.read_contracts()
        widths = {name: contract.dim for name, contract in contracts.items()}
        model = TowerModel(run, tokenizer.embedding_rows(run.data.vocab_size), widths)
        load_distinct(model, load_file(folder.weights))
        return cls(run, model.to(device, torch.float32).eval(), tokenizer, contracts)

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
        return self.encode_tokens(self.tokenizer.encode(captions, self.run.data.context))

    @torch.inference_mode()
    def encode_tokens(self, tokens_bL: Tensor) -> Tensor:
        """Return unit-norm embeddings (b, dim) of rows of tokens."""
        return self.model.encode_text({self.text_tower: tokens_bL.to(self.device)})

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
