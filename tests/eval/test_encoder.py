"""Every kind of model as the tasks see it: shapes, norms, what is kept, what is mixed, what is refused."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.eval.runs import finished
from threetowers.cache.encoders.teacher import load_teacher
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.evaluation_set import EvaluationSet, evaluation_set
from threetowers.eval.encoders.encoder import LoadOptions, NoTextTower
from threetowers.eval.encoders.ensemble import Mixing
from threetowers.eval.encoders.forward import PixelView, TeacherTransform
from threetowers.eval.encoders.image_source import image_source
from threetowers.eval.encoders.load import load_encoder
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model

CAPTIONS = ["a red disc", "a blue bar", "dot, green"]


@pytest.fixture
def data(tars: list[Path]) -> EvaluationSet:
    return evaluation_set([index_tar(tar) for tar in tars], group_field="concept", part_field=None, max_captions=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_embeds_as_its_model_does(clip: dict[str, Any], data: EvaluationSet, workers: int) -> None:
    path = finished(clip)
    encoder = load_encoder(path, LoadOptions(batch_size=7, workers=workers))
    model = load_model(path)
    pixels = torch.stack([center_crop(read_image(data.tars[p.tar], p.ordinal, 10**6), 32) for p in data.pictures])
    np.testing.assert_allclose(encoder.images(data, data.pictures), model.encode_images(pixels).numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.texts(CAPTIONS), model.encode_texts(CAPTIONS).numpy(), atol=1e-5)
    with torch.inference_mode():
        features = model.model.towers["image"](pixels).numpy()
    np.testing.assert_allclose(encoder.features(data, data.pictures), features, atol=1e-4)
    assert encoder.dim == 16
    assert encoder.logit_scale == pytest.approx(14.3)
    assert (encoder.facts.name, encoder.facts.step, encoder.facts.cache_manifest) == ("clip", 3, None)


def test_lower_precision_is_near(clip: dict[str, Any], data: EvaluationSet) -> None:
    path = finished(clip)
    full, half = (load_encoder(path, LoadOptions(precision=p)) for p in ("float32", "bfloat16"))  # type: ignore[arg-type]
    cosines = (full.images(data, data.pictures) * half.images(data, data.pictures)).sum(1)
    assert cosines.min() > 0.99
    assert half.facts.precision == "bfloat16"


def test_mixing_is_what_it_says(three: dict[str, Any], data: EvaluationSet) -> None:
    path = finished(three)
    main = load_encoder(path)
    f, g = main.images(data, data.pictures), main.texts(CAPTIONS)
    trained = load_model(path)
    third_image = load_encoder(path, mixing=Mixing("third", 1.0))
    third_text = load_encoder(path, mixing=Mixing("third", 1.0, "logit")).texts(CAPTIONS)[:, 16:]
    h, g_h = third_image.images(data, data.pictures), third_text
    tokens = trained.tokenizer.encode(CAPTIONS, 8)
    with torch.inference_mode():
        np.testing.assert_allclose(g_h, trained.model.embed({"text": tokens}, ["g_h"])["g_h"].numpy(), atol=1e-5)
    np.testing.assert_allclose(third_image.texts(CAPTIONS), g)
    embedding = load_encoder(path, mixing=Mixing("third", 0.3))
    blend = 0.7 * f + 0.3 * h
    expected = blend / np.linalg.norm(blend, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding.images(data, data.pictures), expected, atol=1e-6)
    logits = load_encoder(path, mixing=Mixing("third", 0.3, "logit"))
    scores = logits.logit_scale * logits.images(data, data.pictures) @ logits.texts(CAPTIONS).T
    np.testing.assert_allclose(scores, 14.3 * (0.7 * f @ g.T + 0.3 * h @ g_h.T), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits.images(data, data.pictures), axis=1), 1, atol=1e-5)
    assert len({e.facts.digest for e in (main, embedding, logits)}) == 3
    assert embedding.facts.name == "three+third=0.3"


def test_mixing_is_refused_where_there_is_nothing_to_mix(clip: dict[str, Any], lit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'third' is none; found none"):
        load_encoder(finished(clip), mixing=Mixing("third", 0.5))
    with pytest.raises(ValueError, match="needs a run with a third tower"):
        load_encoder("open_clip:ViT-B-32", mixing=Mixing("third", 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mixing("third", 1.5)


def test_a_timm_model_equals_the_cache_it_would_build(cache: Path, data: EvaluationSet) -> None:
    weights = cache.parent / "teacher.safetensors"
    live = load_encoder(f"timm:test_resnet@64:{weights}", LoadOptions(workers=0))
    rows = load_encoder(f"cache:{cache}")
    assert live.facts.digest == rows.facts.digest
    assert not live.sees_text
    cosines = (live.images(data, data.pictures) * rows.images(data, data.pictures)).sum(1)
    assert cosines.min() > 0.9999
    np.testing.assert_allclose(live.features(data, data.pictures), rows.features(data, data.pictures), atol=1e-2)
    for encoder in (live, rows):
        with pytest.raises(NoTextTower, match="sees images only"):
            encoder.texts(CAPTIONS)


def test_an_open_clip_model_embeds_as_open_clip_does(data: EvaluationSet, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("RN50", pretrained=None)
    weights = tmp_path / "rn50.safetensors"
    save_file(model.state_dict(), weights)
    encoder = load_encoder(f"open_clip:RN50:{weights}", LoadOptions(batch_size=2, workers=0))
    pictures = data.pictures[:3]
    pixels = torch.stack([transform(read_image(data.tars[p.tar], p.ordinal, 10**6)) for p in pictures])
    model.eval()
    with torch.inference_mode():
        expected = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(open_clip.get_tokenizer("RN50")(CAPTIONS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.images(data, pictures), expected, atol=1e-4)
    np.testing.assert_allclose(encoder.texts(CAPTIONS), texts, atol=1e-4)


def test_what_names_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder of a run or an export"):
        load_encoder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no finished run"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="expected timm:NAME"):
        load_encoder("timm:")
    with pytest.raises(ValueError, match="unknown to timm"):
        load_encoder("timm:no_such_model")


def test_views_survive_being_sent_to_another_process(
    lit: dict[str, Any], clip: dict[str, Any], cache: Path, data: EvaluationSet
) -> None:
    picture = data.pictures[7]
    teacher = load_teacher("test_resnet", str(cache.parent / "teacher.safetensors"), 64)
    views = [
        image_source(load_model(finished(clip)), "image", data, LoadOptions()).view,
        image_source(load_model(finished(lit)), "third", data, LoadOptions()).view,
        PixelView(data.tars, TeacherTransform(teacher.transform), 10**6),
    ]
    for view in views:
        assert torch.equal(pickle.loads(pickle.dumps(view))(picture), view(picture))


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def test_an_export_embeds_as_its_run_does(clip: dict[str, Any], data: EvaluationSet, tmp_path: Path) -> None:
    clip["towers"]["text"] |= {"causal": True, "norm_eps": 1e-5}  # as open_clip can say it
    path = finished(clip)
    run = load_encoder(path, LoadOptions(workers=0))
    own = load_encoder(export(path, tmp_path / "own").folder, LoadOptions(workers=0))
    theirs = load_encoder(f"open_clip:{export(path, tmp_path / 'oc', 'open_clip').folder}", LoadOptions(workers=0))
    np.testing.assert_allclose(own.images(data, data.pictures), run.images(data, data.pictures), atol=1e-6)
    for encoder in (own, theirs):
        np.testing.assert_allclose(encoder.texts(CAPTIONS), run.texts(CAPTIONS), atol=1e-5)
        assert encoder.logit_scale == pytest.approx(run.logit_scale)
    tower = load_encoder(f"timm:{export(path, tmp_path / 'timm', 'timm').folder}", LoadOptions(workers=0))
    assert not tower.sees_text
    pairs = [(theirs.images, run.images), (tower.images, lambda *a: unit(run.features(*a)))]
    # Their transforms resize before they crop.
    for one, other in pairs:
        assert (one(data, data.pictures) * other(data, data.pictures)).sum(1).min() > 0.99
