"""Encoders of transformers against the library's own forward pass, one caption or image at a time."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cache.tiny_transformers import save_image_model, save_pair_model, save_text_model, word_tokenizer
from threetowers.cache.encoders.encoder import FrozenEncoder, state_digest
from threetowers.cache.encoders.huggingface.hf_encoder import load_hf_encoder
from threetowers.cache.encoders.huggingface.loading import quiet, require
from threetowers.cache.encoders.huggingface.tokenizer import tokenizer_digest
from threetowers.cache.encoders.names import EncoderName, EncoderOptions

pytest.importorskip("transformers")
require("transformers", "hf", "hf")

TEXT = ("bert", "bert without pooler", "roberta", "t5", "bart", "qwen", "clip projection")
PAIRS = ("clip", "siglip")
IMAGES = ("vit", "vit classifier", "dinov2 with registers", "resnet", "swin")
CAPTIONS = ["a red disc", "blue", "A GREEN bar, a blue bar, a red bar, a photo of a dog on a bench", "dog on bench", ""]

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """folder_of(kind): the folder of a tiny model, saved once."""
    root = tmp_path_factory.mktemp("models")

    def folder_of(kind: str) -> Path:
        path = root / kind.replace(" ", "-")
        if not path.exists():
            save = save_text_model if kind in TEXT else save_pair_model if kind in PAIRS else save_image_model
            with quiet():
                save(kind, path)
        return path

    return folder_of


def encoder_of(folder: Path | str, **options: Any) -> FrozenEncoder:
    return load_hf_encoder(EncoderName.parse(f"hf:{folder}"), EncoderOptions(**options))


def plain_model(folder: Path, kind: str = "AutoModel") -> Any:
    import transformers

    with quiet():
        return getattr(transformers, kind).from_pretrained(folder).eval()


def plain_tokenizer(folder: Path) -> Any:
    import transformers

    with quiet():
        return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", [*TEXT, *PAIRS])
def test_no_row_depends_on_the_captions_beside_it(kind: str, folder_of: Folders) -> None:
    text = encoder_of(folder_of(kind)).side("text")
    assert len({len(tokens.ids) for tokens in text.tokenize(CAPTIONS)}) > 2
    for feature in text.features:
        together = text.embed(CAPTIONS, feature)
        alone = torch.cat([text.embed([caption], feature) for caption in CAPTIONS])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-6)
        assert together.shape == (len(CAPTIONS), text.width(feature))
        assert together.dtype == torch.float32
        assert (together[0] - together[1]).abs().max() > 1e-4


def reference_states(folder: Path, model: Any, max_length: int) -> list[torch.Tensor]:
    """The states of the tokens (L, D) of each caption, alone and so without padding, as the library gives them."""
    tokenizer = plain_tokenizer(folder)
    found = []
    with torch.inference_mode():
        for caption in CAPTIONS:
            inputs = tokenizer(caption, truncation=True, max_length=max_length, return_tensors="pt")
            ids = inputs.input_ids.long()
            found.append(
                model(input_ids=ids if ids.shape[1] else torch.tensor([[tokenizer.pad_token_id]])).last_hidden_state[0]
            )
    return found


@pytest.mark.parametrize("kind", ["bert", "bert without pooler", "roberta", "t5", "bart"])
def test_encoders_are_pooled_by_the_mean(kind: str, folder_of: Folders) -> None:
    text = encoder_of(folder_of(kind)).side("text")
    model = plain_model(folder_of(kind))
    states = reference_states(folder_of(kind), model.get_encoder() if kind in ("t5", "bart") else model, 12)
    assert (text.processing.pooling, text.processing.max_length) == ("mean", 12)
    for feature, pool in {
        "pooled": lambda x: x.mean(0),
        "mean": lambda x: x.mean(0),
        "cls": lambda x: x[0],
        "last": lambda x: x[-1],
    }.items():
        expected = torch.stack([pool(x) for x in states])
        torch.testing.assert_close(text.embed(CAPTIONS, feature), expected, rtol=1e-5, atol=2e-6)
    if kind in ("bert", "roberta"):
        ids = plain_tokenizer(folder_of(kind))(CAPTIONS[:1], return_tensors="pt").input_ids
        with torch.inference_mode():
            expected = model(input_ids=ids).pooler_output
        torch.testing.assert_close(text.embed(CAPTIONS[:1], "pooler"), expected, rtol=1e-5, atol=2e-6)
    else:
        assert "pooler" not in text.features  # without weights for it, it would be random


def test_decoders_are_pooled_by_their_last_token_on_either_side_of_padding(folder_of: Folders) -> None:
    text = encoder_of(folder_of("qwen")).side("text")
    assert (text.processing.pooling, text.processing.max_length) == ("last", 64)
    assert "cls" not in text.features  # the first token sees no other
    model, tokenizer = plain_model(folder_of("qwen")), plain_tokenizer(folder_of("qwen"))
    states = reference_states(folder_of("qwen"), model, 64)
    torch.testing.assert_close(text.embed(CAPTIONS), torch.stack([x[-1] for x in states]), rtol=1e-5, atol=2e-6)
    assert tokenizer.padding_side == "left"
    inputs = tokenizer(CAPTIONS[:4], padding=True, return_tensors="pt")
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        padded = model(**inputs, position_ids=positions).last_hidden_state[:, -1]
    torch.testing.assert_close(text.embed(CAPTIONS[:4]), padded, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_both_sides_of_a_pair_are_in_its_joint_space(kind: str, folder_of: Folders) -> None:
    folder = folder_of(kind)
    encoder = encoder_of(folder)
    model = plain_model(folder)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    inputs = plain_tokenizer(folder)(
        CAPTIONS, padding="max_length" if kind == "siglip" else True, truncation=True, return_tensors="pt"
    )
    if kind == "siglip":
        del inputs["attention_mask"]
    x_b3HW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    image = encoder.side("image")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image.preprocessing.mean, image.preprocessing.std))
    with torch.inference_mode():
        words = model.get_text_features(**inputs).pooler_output
        pictures = model.get_image_features(pixel_values=(x_b3HW / 255 - mean) / std).pooler_output
        before = model.text_model(**inputs).pooler_output
    text = encoder.side("text")
    torch.testing.assert_close(text.embed(CAPTIONS, "projected"), words, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(text.embed(CAPTIONS), before, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(image.embed(x_b3HW, "projected"), pictures, rtol=1e-5, atol=2e-6)
    assert text.processing.pooling == "pooler"


def test_one_side_of_a_pair_has_its_projection(folder_of: Folders) -> None:
    folder = folder_of("clip projection")
    encoder = encoder_of(folder)
    assert encoder.image is None
    inputs = plain_tokenizer(folder)(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        expected = plain_model(folder, "CLIPTextModelWithProjection")(**inputs).text_embeds
    torch.testing.assert_close(encoder.side("text").embed(CAPTIONS, "projected"), expected, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="has no image side: choose an encoder that has one, or use --of text"):
        encoder.side("image")


@pytest.mark.parametrize("kind", [*IMAGES, "clip"])
def test_image_features_are_those_of_the_library(kind: str, folder_of: Folders) -> None:
    folder = folder_of(kind)
    image = encoder_of(folder).side("image")
    x_b3HW = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image.preprocessing.mean, image.preprocessing.std))
    model = plain_model(folder)
    tower = model.vision_model if kind == "clip" else model
    with torch.inference_mode():
        output = tower(pixel_values=(x_b3HW / 255 - mean) / std)
        states = output.last_hidden_state
        if kind == "clip":
            states = tower.post_layernorm(states)
    classes = {"vit": 1, "vit classifier": 1, "clip": 1, "dinov2 with registers": 4}.get(kind, 0)
    if states.ndim == 4:
        states = states.flatten(2).transpose(1, 2)
    patches = states[:, classes:].mean(1)
    expected = {} if kind == "resnet" else {"mean_patch": patches}  # of maps there is the pooled feature alone
    if classes:
        expected |= {"cls": states[:, 0], "cls+mean_patch": torch.cat([states[:, 0], patches], dim=1)}
    pooler = output.pooler_output
    expected["pooled"] = states[:, 0] if kind.startswith("vit") else pooler.flatten(1)  # ViT's is of another task
    found = image.forward(x_b3HW, tuple(expected))
    for (feature, x_bD), y_bD in zip(expected.items(), found, strict=True):
        torch.testing.assert_close(y_bD.clone(), x_bD.clone(), rtol=1e-5, atol=2e-6, msg=feature)
    assert set(image.features) - {"projected"} == set(expected)


def test_layers_are_features(folder_of: Folders) -> None:
    image = encoder_of(folder_of("vit")).side("image")
    x_b3HW = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    last, pooled = image.forward(x_b3HW, ("layer:layernorm", "pooled"))
    cls, patches = image.forward(x_b3HW, ("cls", "mean_patch"))
    assert last.equal(patches)  # without the class token
    assert image.width("layer:embeddings") == image.width("layer:layers.0") == 16
    assert pooled.equal(cls)
    with pytest.raises(ValueError, match=r"layer:nowhere: expected the name of a module, as one of embeddings"):
        image.width("layer:nowhere")
    with pytest.raises(ValueError, match=r"layer:NAME, found 'projected': the model has no joint space of images"):
        image.width("projected")
    (cut,) = encoder_of(folder_of("resnet")).side("image").forward(x_b3HW, ("layer:embedder",))
    assert cut.shape == (2, 8)


@pytest.mark.parametrize("kind", [*IMAGES, *PAIRS])
@pytest.mark.parametrize("size", [(61, 40), (32, 32), (33, 90)])
def test_pixels_are_those_of_the_processor(kind: str, size: tuple[int, int], folder_of: Folders, draw: Any) -> None:
    import transformers

    image = encoder_of(folder_of(kind)).side("image")
    picture = draw(3, size)
    with quiet():
        processor = transformers.AutoImageProcessor.from_pretrained(folder_of(kind), backend="pil")
        default = transformers.AutoImageProcessor.from_pretrained(folder_of(kind))
    expected = torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"][0])
    transform = pickle.loads(pickle.dumps(image.transform))
    pixels = torch.from_numpy(np.ascontiguousarray(transform(picture)))
    assert pixels.dtype == torch.uint8
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image.preprocessing.mean, image.preprocessing.std))
    torch.testing.assert_close((pixels / 255 - mean) / std, expected, rtol=0, atol=1e-6)
    by_torchvision = default(images=picture, return_tensors="pt")["pixel_values"][0]
    assert ((expected - by_torchvision).abs() * std).max() < 0.05


def test_a_size_of_ones_own_resamples_positions(folder_of: Folders) -> None:
    native, large = encoder_of(folder_of("vit")), encoder_of(f"{folder_of('vit')}@48")
    side = large.side("image")
    assert side.preprocessing.input_size == (48, 48)
    assert side.transform(Image.new("RGB", (70, 60))).shape == (3, 48, 48)
    assert side.width("cls+mean_patch") == 32
    assert native.weights_digest == large.weights_digest
    assert encoder_of(f"{folder_of('vit')}@32").side("image").preprocessing == native.side("image").preprocessing
    cropped = encoder_of(f"{folder_of('clip')}@40").side("image")
    assert (cropped.preprocessing.crop_pct, cropped.preprocessing.crop_mode) == (0.8, "center")
    assert cropped.transform(Image.new("RGB", (70, 60))).shape == (3, 40, 40)
    assert cropped.width("projected") == 8
    with pytest.raises(ValueError, match="does not take images of 4x4 pixels"):
        encoder_of(f"{folder_of('vit')}@4")


def test_captions_are_cut_where_the_model_ends(folder_of: Folders) -> None:
    text = encoder_of(folder_of("bert")).side("text")
    fits, too_long = " ".join(["red"] * 10), " ".join(["red"] * 11)
    found = text.tokenize([fits, too_long, "a blob"])
    assert [(len(tokens.ids), tokens.cut) for tokens in found] == [(12, False), (12, True), (4, False)]
    assert found[0].ids == found[1].ids == [2, *[5] * 10, 3]
    assert found[2].ids == [2, 4, 1, 3]
    short = encoder_of(folder_of("bert"), max_length=5, prompt="a photo of ").side("text")
    assert short.tokenize(["dog"])[0] == ([2, 4, 10, 11, 3], True)
    assert (short.processing.max_length, short.processing.prompt) == (5, "a photo of ")
    assert short.processing.tokenizer_digest == text.processing.tokenizer_digest
    for length in (2, 13):
        with pytest.raises(ValueError, match=rf"--max-length: found {length}, expected 3 to 12 tokens"):
            encoder_of(folder_of("bert"), max_length=length)
    with pytest.raises(ValueError, match=r"--max-length: found 8, expected 12: it was trained on captions padded"):
        encoder_of(folder_of("siglip"), max_length=8)
    assert text.tokenize([]) == []
    assert encoder_of(folder_of("roberta")).side("text").embed([too_long]).isfinite().all()


def test_the_tokenizer_digest_is_of_what_decides_the_ids() -> None:
    first = tokenizer_digest(word_tokenizer())
    used = word_tokenizer()
    used(["a", "a red disc"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(used) == first
    cased, renamed, more = word_tokenizer(), word_tokenizer(), word_tokenizer()
    from tokenizers import normalizers

    cased.backend_tokenizer.normalizer = normalizers.NFC()
    state = json.loads(renamed.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {"red": 6, "green": 5}
    from tokenizers import Tokenizer

    more.add_tokens(["cross"])
    digests = [tokenizer_digest(t) for t in (cased, Tokenizer.from_str(json.dumps(state)), more)]
    assert len({first, *digests}) == 4


def test_a_tokenizer_in_python_has_a_digest(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    digests = []
    for number, words in enumerate((["a</w>", "b</w>"], ["b</w>", "a</w>"], ["a</w>", "b</w>"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate([*words, "<unk>"])}))
        (folder / "merges.txt").write_text("#version: 0.2\na </w>\n")
        with quiet():
            tokenizer = CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        assert not tokenizer.is_fast
        digests.append(tokenizer_digest(tokenizer))
    assert digests[0] == digests[2] != digests[1]


def test_name_weights_and_digest(folder_of: Folders, tmp_path: Path) -> None:
    folder = folder_of("bert")
    encoder = encoder_of(folder)
    assert (encoder.name, encoder.weights) == (f"hf:{folder}", str(folder))
    assert encoder.weights_digest == state_digest(plain_model(folder).state_dict())
    assert encoder.packages == ("torch", "transformers", "tokenizers", "pillow")
    moved = shutil.copytree(folder, tmp_path / "moved")
    again = load_hf_encoder(EncoderName("hf", "org/bert", None, str(moved)), EncoderOptions())
    assert (again.name, again.weights, again.weights_digest) == ("hf:org/bert", str(moved), encoder.weights_digest)


def test_loading_says_nothing(folder_of: Folders, capfd: Any, caplog: Any) -> None:
    import transformers

    before = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    for kind in ("bert without pooler", "qwen", "clip"):
        text = encoder_of(folder_of(kind)).side("text")
        text.embed(["red " * 200])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert before == (transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled())


def test_a_folder_of_sentence_transformers_is_pointed_out(folder_of: Folders, tmp_path: Path, caplog: Any) -> None:
    folder = shutil.copytree(folder_of("bert"), tmp_path / "st")
    (folder / "modules.json").write_text("[]")
    encoder_of(folder)
    assert "st: pools its states as its files say, hf: by 'mean'" in caplog.text


def test_bfloat16_is_close(folder_of: Folders) -> None:
    wide = encoder_of(folder_of("bert")).side("text").embed(CAPTIONS)
    narrow = encoder_of(folder_of("bert"), precision="bfloat16").side("text").embed(CAPTIONS)
    assert narrow.dtype == torch.float32
    assert not narrow.equal(wide)
    assert torch.cosine_similarity(wide, narrow).min() > 0.999


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_cannot_be_loaded_is_refused_in_one_line(folder_of: Folders, tmp_path: Path, monkeypatch: Any) -> None:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(folder_of(kind), tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"))

    def refused(folder: Path | str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            encoder_of(folder)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "no such folder")
    for kind in ("bert", "clip"):  # of which transformers makes an empty tokenizer
        folder = copy(kind)
        for file in folder.glob("token*"):
            file.unlink()
        refused(folder, r"expected a tokenizer with its vocabulary \(tokenizer.json\), found none")
    folder = copy("vit")
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "cannot load the image processor of")
    folder = copy("vit")
    change(folder / "preprocessor_config.json", size={"shortest_edge": 32})
    refused(folder, r"expected an image processor that resizes, .* found ViTImageProcessorPil: its size .* one size")
    folder = copy("vit")
    change(folder / "preprocessor_config.json", rescale_factor=1 / 127.5)
    refused(folder, r"its normalisation is not \(x / 255 - mean\) / std")
    folder = copy("bert")
    change(folder / "config.json", num_hidden_layers=3)
    refused(folder, r"expected all weights of a BertModel, found 16 tensors missing \(encoder\.layer\.2")
    folder = copy("bert")
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(folder, "cannot load the model of")
    folder = copy("bert")
    change(folder / "config.json", model_type="my_own", auto_map={"AutoConfig": "code.MyConfig"})
    (folder / "code.py").write_text("raise SystemExit('was run')")
    refused(folder, "code inside the model's own repository, which is never run")
    folder = copy("bert")
    with quiet():
        word_tokenizer().save_pretrained(folder)
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(["cross"])
        tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="gives the id 15, but the model has 15 token embeddings"):
        encoder_of(folder).side("text").embed(["a cross"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("org/no-such-model", "without a connection, download its files and name their folder instead")
    refused("org/no-such-model@v2", "without a connection, download its files and name their folder instead")
