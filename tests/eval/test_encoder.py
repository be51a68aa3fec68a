"""Every kind of model as the tasks see it: embeddings, norms, ensembles, and errors."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.eval.runs import finished
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.webdataset.sample import read_image
from threetowers.cache.webdataset.tar_index import index_tar
from threetowers.eval.datasets.image_set import ImageSet, read_images
from threetowers.eval.encoders.encoder import LoadOptions, NoTextTower
from threetowers.eval.encoders.ensemble import EnsembleOptions
from threetowers.eval.encoders.forward import PixelView, TeacherTransform
from threetowers.eval.encoders.load import check_options, load_encoder
from threetowers.eval.encoders.run_encoder import load_deployed_heads
from threetowers.trainer.data.transforms import center_crop
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model

CAPTIONS = ["a red disc", "a blue bar", "dot, green"]


@pytest.fixture
def data(tars: list[Path]) -> ImageSet:
    return read_images([index_tar(tar) for tar in tars])


@pytest.mark.parametrize("workers", [0, 2])
def test_run_encoder_equals_its_model(clip: dict[str, Any], data: ImageSet, workers: int) -> None:
    path = finished(clip)
    encoder = load_encoder(path, LoadOptions(batch_size=7, workers=workers))
    model = load_model(path)
    pixels = torch.stack([center_crop(read_image(data.tars[p.tar], p.ordinal, 10**6), 32) for p in data.images])
    np.testing.assert_allclose(encoder.images(data, data.images), model.encode_images(pixels).numpy(), atol=1e-5)
    np.testing.assert_allclose(encoder.texts(CAPTIONS), model.encode_texts(CAPTIONS).numpy(), atol=1e-5)
    with torch.inference_mode():
        features = model.model.towers["image"](pixels).numpy()
    np.testing.assert_allclose(encoder.features(data, data.images), features, atol=1e-4)
    assert encoder.dim == 16
    assert encoder.logit_scale == pytest.approx(14.3)
    assert (encoder.info.name, encoder.info.step, encoder.info.cache_manifest) == ("clip", 3, None)
    digest = hashlib.sha256(Path(clip["data"]["tokenizer"]).read_bytes()).hexdigest()
    assert encoder.info.tokenizer == f"{clip['data']['tokenizer']} (sha256 {digest})"


def test_lower_precision_is_close(clip: dict[str, Any], data: ImageSet) -> None:
    path = finished(clip)
    full, half = (load_encoder(path, LoadOptions(precision=p)) for p in ("float32", "bfloat16"))  # type: ignore[arg-type]
    cosines = (full.images(data, data.images) * half.images(data, data.images)).sum(1)
    assert cosines.min() > 0.99
    assert half.info.precision == "bfloat16"


def test_ensemble_equals_its_formula(three: dict[str, Any], data: ImageSet) -> None:
    path = finished(three)
    main = load_encoder(path)
    f, g = main.images(data, data.images), main.texts(CAPTIONS)
    trained = load_model(path)
    third_image = load_encoder(path, ensemble=EnsembleOptions("third", 1.0))
    third_text = load_encoder(path, ensemble=EnsembleOptions("third", 1.0, "logit")).texts(CAPTIONS)[:, 16:]
    h, g_h = third_image.images(data, data.images), third_text
    tokens = trained.tokenizer.encode(CAPTIONS, 8)
    with torch.inference_mode():
        np.testing.assert_allclose(g_h, trained.model.embed({"text": tokens}, ["g_h"])["g_h"].numpy(), atol=1e-5)
    np.testing.assert_allclose(third_image.texts(CAPTIONS), g)
    embedding = load_encoder(path, ensemble=EnsembleOptions("third", 0.3))
    blend = 0.7 * f + 0.3 * h
    expected = blend / np.linalg.norm(blend, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding.images(data, data.images), expected, atol=1e-6)
    logits = load_encoder(path, ensemble=EnsembleOptions("third", 0.3, "logit"))
    scores = logits.logit_scale * logits.images(data, data.images) @ logits.texts(CAPTIONS).T
    np.testing.assert_allclose(scores, 14.3 * (0.7 * f @ g.T + 0.3 * h @ g_h.T), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits.images(data, data.images), axis=1), 1, atol=1e-5)
    assert len({e.info.digest for e in (main, embedding, logits)}) == 3
    assert embedding.info.name == "three+third=0.3"


def test_ensemble_without_third_tower_is_refused(clip: dict[str, Any], lit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'third' is none; found none"):
        load_encoder(finished(clip), ensemble=EnsembleOptions("third", 0.5))
    with pytest.raises(ValueError, match="needs a run with a third tower"):
        load_encoder("open_clip:ViT-B-32", ensemble=EnsembleOptions("third", 0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        EnsembleOptions("third", 1.5)


def test_timm_encoder_equals_a_cache_of_the_same_model(cache: Path, data: ImageSet) -> None:
    weights = cache.parent / "teacher.safetensors"
    live = load_encoder(f"timm:test_resnet@64:{weights}", LoadOptions(workers=0))
    rows = load_encoder(f"cache:{cache}")
    assert live.info.digest == rows.info.digest
    assert not live.sees_text
    cosines = (live.images(data, data.images) * rows.images(data, data.images)).sum(1)
    assert cosines.min() > 0.9999
    np.testing.assert_allclose(live.features(data, data.images), rows.features(data, data.images), atol=1e-2)
    for encoder in (live, rows):
        with pytest.raises(NoTextTower, match="sees images only"):
            encoder.texts(CAPTIONS)


def test_open_clip_encoder_equals_open_clip(data: ImageSet, tmp_path: Path) -> None:
    import open_clip

    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("RN50", pretrained=None)
    weights = tmp_path / "rn50.safetensors"
    save_file(model.state_dict(), weights)
    encoder = load_encoder(f"open_clip:RN50:{weights}", LoadOptions(batch_size=2, workers=0))
    images = data.images[:3]
    pixels = torch.stack([transform(read_image(data.tars[p.tar], p.ordinal, 10**6)) for p in images])
    model.eval()
    with torch.inference_mode():
        expected = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(open_clip.get_tokenizer("RN50")(CAPTIONS), normalize=True).numpy()
    np.testing.assert_allclose(encoder.images(data, images), expected, atol=1e-4)
    np.testing.assert_allclose(encoder.texts(CAPTIONS), texts, atol=1e-4)


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder of a run or an export"):
        load_encoder(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no finished run"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="expected an encoder as KIND:NAME"):
        load_encoder("timm:")
    with pytest.raises(ValueError, match="unknown to timm"):
        load_encoder("timm:no_such_model")


def test_image_views_can_be_pickled(lit: dict[str, Any], clip: dict[str, Any], cache: Path, data: ImageSet) -> None:
    image = data.images[7]
    teacher = load_frozen_encoder(f"timm:test_resnet@64:{cache.parent}/teacher.safetensors").side("image")
    views = [
        load_deployed_heads(finished(clip), LoadOptions()).image.view(data),
        load_deployed_heads(finished(lit), LoadOptions()).image.view(data),
        PixelView(data.tars, TeacherTransform(teacher.transform), 10**6),
    ]
    for view in views:
        assert torch.equal(pickle.loads(pickle.dumps(view))(image), view(image))


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def test_export_embeds_like_its_run(clip: dict[str, Any], data: ImageSet, tmp_path: Path) -> None:
    clip["towers"]["text"] |= {"causal": True, "norm_eps": 1e-5}  # as open_clip can express it
    path = finished(clip)
    run = load_encoder(path, LoadOptions(workers=0))
    own = load_encoder(export(path, tmp_path / "own").folder, LoadOptions(workers=0))
    theirs = load_encoder(f"open_clip:{export(path, tmp_path / 'oc', 'open_clip').folder}", LoadOptions(workers=0))
    np.testing.assert_allclose(own.images(data, data.images), run.images(data, data.images), atol=1e-6)
    for encoder in (own, theirs):
        np.testing.assert_allclose(encoder.texts(CAPTIONS), run.texts(CAPTIONS), atol=1e-5)
        assert encoder.logit_scale == pytest.approx(run.logit_scale)
    tower = load_encoder(f"timm:{export(path, tmp_path / 'timm', 'timm').folder}", LoadOptions(workers=0))
    assert not tower.sees_text
    by_onnx = load_encoder(f"timm:{tmp_path / 'timm'}", LoadOptions(workers=0, runtime="onnx"))
    np.testing.assert_allclose(by_onnx.images(data, data.images), tower.images(data, data.images), atol=1e-5)
    assert by_onnx.info.fingerprint != tower.info.fingerprint
    check_options([own, theirs], LoadOptions(runtime="onnx"))
    with pytest.raises(ValueError, match="--runtime onnx: found no KIND:NAME among the models"):
        check_options([own], LoadOptions(runtime="onnx"))
    named = load_encoder(f"run:{path}", LoadOptions(workers=0))
    assert named.info == run.info
    pairs = [(theirs.images, run.images), (tower.images, lambda *a: unit(run.features(*a)))]
    # Their transforms resize before they crop.
    for one, other in pairs:
        assert (one(data, data.images) * other(data, data.images)).sum(1).min() > 0.99
