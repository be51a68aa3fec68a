"""Prompts for zero-shot classification: templates with a slot for the class name, and the published sets of them.

`prompts.yaml` holds CLIP's templates for the common data sets; class names come with a data set, or from the packages
that publish them: `open_clip:imagenet` (1,000 names) and `clip_benchmark:SET`.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml

from threetowers.eval.metrics.classification import Floats

SLOTS = ("{c}", "{}")
SHIPPED = Path(__file__).with_name("prompts.yaml")


class PromptError(ValueError):
    """Prompts or class names that do not exist. The message names what was requested and what there is."""


def prompt_templates(prompts: Sequence[str] | str) -> list[str]:
    """Return templates with the slot `{c}`.

    Args:
        prompts: Templates, in which `{}` is the same slot; or the name of a shipped prompt set.

    Raises:
        PromptError: The name is unknown, there is no template, or a template has no slot.
    """
    if isinstance(prompts, str):
        sets = shipped_prompts()
        if prompts not in sets:
            raise PromptError(
                f"expected a list of templates or the name of a shipped prompt set, {sorted(sets)}; found {prompts!r}"
            )
        return sets[prompts]
    if not prompts:
        raise PromptError("expected at least one template, as in 'a photo of a {c}.', found an empty list")
    for template in prompts:
        if sum(template.count(slot) for slot in SLOTS) == 0:
            raise PromptError(f"the template {template!r} has no slot for the class name: write {{c}} where it belongs")
    return [template.replace("{}", "{c}") for template in prompts]


def shipped_prompts() -> dict[str, list[str]]:
    """Return the templates of `prompts.yaml` by data set."""
    sets: dict[str, list[str]] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    return sets


def class_names(reference: str) -> list[str]:
    """Return the class names that a package publishes. Raises PromptError where it is not installed or has none."""
    package, _, name = reference.partition(":")
    if package == "open_clip" and name == "imagenet":
        # Loaded from its file, as importing the package would import torch's model zoo with it.
        names: list[str] = list(_module(_file("open_clip", "zero_shot_metadata.py")).IMAGENET_CLASSNAMES)
        return names
    if package == "clip_benchmark":
        sets: dict[str, Any] = json.loads(_file("clip_benchmark", "datasets/en_classnames.json").read_text())
        if sets.get(name):
            return list(sets[name])
        raise PromptError(f"{reference}: clip_benchmark has names for {sorted(key for key in sets if sets[key])}")
    raise PromptError(f"classes {reference!r}: expected a list, a mapping, open_clip:imagenet or clip_benchmark:SET")


def fill_templates(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the prompts of all classes: every prompt of the first class, then of the second, and so on."""
    return [template.replace("{c}", name) for name in names for template in templates]


def class_embeddings(prompt_PD: Floats, classes: int) -> Floats:
    """Return unit-norm class embeddings (classes, D): the normalised mean of the unit vectors of each class's prompts.

    Args:
        prompt_PD: Embeddings of the prompts in the order of `fill_templates`, of any norm.
        classes: Number of classes.

    Raises:
        ValueError: The embeddings of a class cancel out, or are NaN.
    """
    unit_PD = prompt_PD / np.linalg.norm(prompt_PD, axis=1, keepdims=True)
    mean_CD = unit_PD.reshape(classes, -1, prompt_PD.shape[1]).mean(axis=1)
    norm_C1 = np.linalg.norm(mean_CD, axis=1, keepdims=True)
    if not (norm_C1 > 1e-6).all():
        bad = int((~(norm_C1[:, 0] > 1e-6)).argmax())
        raise ValueError(
            f"the prompts of class {bad} have no mean direction (norm {norm_C1[bad, 0]}): NaN, or opposites"
        )
    return np.asarray(mean_CD / norm_C1, np.float32)


def prompts_hash(prompts: Sequence[str]) -> str:
    """Return the SHA-256 (64 hex digits) of some texts in their order."""
    return hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()


def _file(package: str, path: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PromptError(f"class names of {package}: it is not installed; pip install {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0]) / path


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
