"""A run exported for open_clip: its embeddings there, and its recalls in clip-benchmark, are the run's own."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import picture, samples_of, write_tar
from tests.eval.runs import finished
from threetowers.eval.encoders.load import load_encoder
from threetowers.eval.suite import plan_evaluations, run_evaluation
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model

CAUSAL = {"kind": "text", "width": 16, "depth": 2, "heads": 2, "causal": True, "norm_eps": 1e-5}
SAMPLES = 20  # one of each kind of picture: no two captions are equal


@pytest.fixture
def run(clip: dict[str, Any]) -> Path:
    clip["data"]["context_length"] = 16  # so that no two captions are cut to equal tokens
    clip["towers"] = clip["towers"] | {"image": {"kind": "timm", "model": "test_resnet"}, "text": CAUSAL}
    return finished(clip)


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    return export(run, tmp_path / "exported", "open_clip").folder


def test_the_three_lines_of_open_clip_give_our_embeddings(run: Path, exported: Path) -> None:
    import open_clip

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{exported}")
    model.eval()  # open_clip hands models out in training mode, in which a batch norm takes the batch's moments
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
    captions = ["a red disc", "", "  BLUE   bar ", "dot, \uff47reen", "a cross " * 20, "</s> disc <pad>"]
    images = [Image.open(io.BytesIO(picture("red", thing, 5))) for thing in ("disc", "bar", "cross")]
    ours = load_model(run)
    with torch.no_grad():
        text_bD = model.encode_text(tokenizer(captions), normalize=True)
        image_bD = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
    torch.testing.assert_close(text_bD, ours.encode_texts(captions), atol=1e-5, rtol=0)
    pixels = torch.stack([center_crop(image, 32) for image in images])
    torch.testing.assert_close(image_bD, ours.encode_images(pixels), atol=1e-5, rtol=0)


def test_clip_benchmark_finds_the_recalls_of_the_run(run: Path, exported: Path, tmp_path: Path) -> None:
    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    models = pytest.importorskip("clip_benchmark.models.open_clip")
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval")
    captions = [json.loads(members["json"])["captions"] for _, members in samples_of(0, SAMPLES)]
    images = [members["png"] for _, members in samples_of(0, SAMPLES)]
    samples = [
        (f"s{i:03}", {"png": image, "txt": "\n".join(texts).encode()})
        for i, (image, texts) in enumerate(zip(images, captions, strict=True))
    ]
    write_tar(folder / "test/0.tar", samples)

    model, transform, tokenizer = models.load_open_clip(f"local-dir:{exported}", pretrained=None)
    pixels = torch.stack([transform(Image.open(io.BytesIO(image))) for image in images])
    batches = [(pixels[start : start + 6], captions[start : start + 6]) for start in range(0, SAMPLES, 6)]
    found = retrieval.evaluate(model.eval(), batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])

    (planned,) = plan_evaluations(folder).evaluations  # a folder of theirs is evaluated by their rules
    record = run_evaluation(planned, load_encoder(run), tmp_path / "report")
    recalls = [found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)]
    assert recalls == pytest.approx([record.metrics[f"text_to_image/recall@{k}"] for k in (1, 5, 10)])
    assert 0 < recalls[1] < recalls[2] < 1
    backwards = [found[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)]
    assert backwards == pytest.approx([record.metrics[f"image_to_text/recall@{k}"] for k in (1, 5, 10)])
    assert record.counts["text_to_image/tied"] == record.counts["image_to_text/tied"] == 0
