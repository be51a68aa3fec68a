"""Prompts: which templates are accepted, where class names come from, and class embeddings."""

import numpy as np
import pytest
import torch

from threetowers.eval.datasets.prompts import (
    PromptError,
    class_embeddings,
    class_names,
    fill_templates,
    prompt_templates,
    shipped_prompts,
)


def test_shipped_sets_are_templates() -> None:
    sets = shipped_prompts()
    assert {"name", "photo", "imagenet", "imagenet_simple", "cifar100", "pets"} <= sets.keys()
    assert len(sets["imagenet"]) == 80
    assert len(sets["imagenet_simple"]) == 7
    for name, templates in sets.items():
        assert prompt_templates(templates) == prompt_templates(name)


def test_shipped_imagenet_prompts_equal_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert set(shipped_prompts()["imagenet"]) == {t("{c}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES}
    assert class_names("open_clip:imagenet") == list(open_clip.IMAGENET_CLASSNAMES)


def test_class_names_of_clip_benchmark() -> None:
    pytest.importorskip("clip_benchmark")
    assert class_names("clip_benchmark:mnist") == [str(n) for n in range(10)]
    with pytest.raises(PromptError, match="clip_benchmark has names for"):
        class_names("clip_benchmark:food101")


def test_both_slots_and_braces_in_names() -> None:
    assert fill_templates(prompt_templates(["a {} here", "{c}, {c}"]), ["x{c}", "{}"]) == [
        "a x{c} here",
        "x{c}, x{c}",
        "a {} here",
        "{}, {}",
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one template"),
        (["a photo of a {c}.", "a photo"], "'a photo' has no slot"),
        (["a {classname}"], "has no slot"),
        ("imagenett", "shipped prompt set, .*found 'imagenett'"),
    ],
)
def test_bad_prompts_are_refused(prompts: list[str] | str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prompt_templates(prompts)


@pytest.mark.parametrize("reference", ["imagenet", "open_clip:cars", "nowhere:imagenet"])
def test_unknown_names_are_refused(reference: str) -> None:
    with pytest.raises(PromptError, match="expected a list, a mapping"):
        class_names(reference)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PromptError, match="pip install open-clip"):
        class_names("open_clip:imagenet")


def test_class_embeddings_equal_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a text tower that looks its embeddings up."""
    open_clip = pytest.importorskip("open_clip")
    names, templates = ["cat", "dog", "emu"], ["a {c}", "the {c}", "{c}s", "{c}!"]
    table = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    texts = fill_templates(templates, names)

    class Tower(torch.nn.Module):
        def encode_text(self, rows: torch.Tensor, normalize: bool) -> torch.Tensor:
            return torch.nn.functional.normalize(table[rows], dim=1)

    peer = open_clip.build_zero_shot_classifier(
        Tower(),
        lambda prompts: torch.tensor([texts.index(prompt) for prompt in prompts]),
        names,
        [t.replace("{c}", "{}") for t in templates],
    )
    np.testing.assert_allclose(class_embeddings(table.numpy(), 3), peer.T.numpy(), atol=1e-6)


def test_prompts_that_cancel_out_are_refused() -> None:
    x = np.array([[1, 0], [0, 1], [1, 0], [-1, 0]], np.float32)
    with pytest.raises(ValueError, match="the prompts of class 1 have no mean direction"):
        class_embeddings(x, 2)
