"""The encoders that tests use are found and behave as those of other packages do."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cache.text_encoders import HUGE, NONFINITE, PROCESS_ENV
from threetowers.cache.encoders.names import EncoderOptions, encoder_kinds, load_frozen_encoder

CAPTIONS = ["a red dog", "dog", "a very long caption of far more than eight words", "red a dog"]


def test_a_row_does_not_depend_on_the_rest_of_its_batch() -> None:
    text = load_frozen_encoder("test:bag").side("text")
    alone = torch.cat([text.embed([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(text.embed(CAPTIONS), alone)
    assert [tokens.cut for tokens in text.tokenize(CAPTIONS)] == [False, False, True, False]
    assert not torch.equal(alone[0], alone[3])
    assert text.width("projected") < text.width()
    assert not torch.isfinite(text.embed([f"a {NONFINITE} dog"])).any()
    assert text.embed([f"a {HUGE} dog"]).abs().max() > 65504
    with pytest.raises(ValueError, match="feature: expected one of pooled, projected, found 'cls'"):
        text.embed(["a"], "cls")


def test_seed_prompt_and_length_change_what_an_encoder_says() -> None:
    plain = load_frozen_encoder("test:bag")
    other = load_frozen_encoder("test:bag:seed:1")
    assert plain.weights_digest == load_frozen_encoder("test:bag").weights_digest != other.weights_digest
    options = EncoderOptions(prompt="a photo of ", max_length=3)
    prompted = load_frozen_encoder("test:bag", options).side("text")
    assert torch.equal(prompted.embed(["dogs"]), plain.side("text").embed(["a photo of"]))
    assert (prompted.processing.prompt, prompted.processing.max_length) == ("a photo of ", 3)
    with pytest.raises(ValueError, match="test:bag has no image side"):
        plain.side("image")


def test_a_pair_has_a_joint_space() -> None:
    pair = load_frozen_encoder("test:pair")
    image = pair.side("image")
    pixels = image.transform(Image.new("RGB", (40, 30), "red"))
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), np.uint8)
    assert image.embed(torch.from_numpy(pixels)[None]).shape == (1, image.width())
    assert image.width("projected") == pair.side("text").width("projected")


def test_child_processes_find_them() -> None:
    assert "test" in encoder_kinds()
    code = "from threetowers.cache.encoders.names import *; print(load_frozen_encoder('test:bag').name)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=PROCESS_ENV, capture_output=True, text=True, cwd="/", check=True)
    assert found.stdout.strip() == "test:bag"
