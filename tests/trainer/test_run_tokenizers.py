"""Runs on other tokenizers than ours, and on captions that are padded to the longest of a batch."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cache.tiny_transformers import word_tokenizer
from tests.trainer.finished_runs import finished_run
from tests.trainer.launches import ENVIRONMENT, TRAIN, losses, run_command, write_config
from tests.trainer.loading import load_batches, loader_of, open_run
from threetowers.cache.encoders.names import load_frozen_encoder
from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.data.batch import Batch, join_parts
from threetowers.trainer.data.worker_plan import WorkerPlan
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.initial.vocabularies import other_vocabularies
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.run.run_folder import RunFolder

CAPTIONS = ["a red disc", "a", "", "photo of a dog on a bench! and much more than there is room for"]
TOWERS = [
    {"pool": "eos"},
    {"pool": "eos", "causal": True, "mask_padding": False},
    {"pool": "mean"},
    {"pool": "mean", "causal": True},
]


@pytest.fixture
def named(tokenizer: Path, tmp_path: Path) -> dict[str, str]:
    """A tokenizer of each kind: that of transformers pads with its own token, CLIP's with that of a word."""
    word_tokenizer().save_pretrained(tmp_path / "hf")
    return {"sentencepiece": str(tokenizer), "hf": f"hf:{tmp_path / 'hf'}", "open_clip": "open_clip:ViT-B-32"}


@pytest.mark.parametrize("kind", ["sentencepiece", "hf", "open_clip"])
@pytest.mark.parametrize("text", TOWERS, ids=str)
def test_losses_and_gradients_do_not_depend_on_padding(
    kind: str, text: dict[str, Any], clip: dict[str, Any], named: dict[str, str]
) -> None:
    clip["towers"]["text"] |= text | {"depth": 2}
    clip["data"]["context_length"] = 96
    tokenizer = load_named_tokenizer(named[kind])
    torch.manual_seed(0)
    model = TowerModel(parse(clip), tokenizer.embedding_rows(None), {}, tokenizer.special.end)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = {}
    for padding in ("longest", "context_length"):
        config = parse(clip | {"data": clip["data"] | {"caption_padding": padding}})
        tokens_bL = tokenizer.encode(CAPTIONS, 96, config.caption_padding)
        assert (tokens_bL.shape[1] < 96) == (padding == "longest")
        model.zero_grad()
        outputs = model({"image": images, "text": tokens_bL})
        loss, _ = total_loss(config, outputs, torch.arange(4))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[padding] = loss.detach(), outputs.embeddings["g"].detach(), gradients
    for short, full in zip(found["longest"], found["context_length"], strict=True):
        assert float((short - full).norm() / full.norm()) < 1e-5


def test_a_word_that_is_also_the_padding_is_read(clip: dict[str, Any], named: dict[str, str]) -> None:
    """CLIP pads with 0, which is an exclamation mark; a mask by this id would hide it."""
    tokenizer = load_named_tokenizer(named["open_clip"])
    clip["towers"]["text"] |= {"pool": "mean", "mask_padding": True}
    model = TowerModel(parse(clip), tokenizer.embedding_rows(None), {}, tokenizer.special.end).eval()
    tokens_bL = tokenizer.encode(["a !~ disc", "a disc"], 8)
    assert 0 in tokens_bL[0, :5]
    tower = model.towers["text"]
    with torch.inference_mode():
        first = tower(tokens_bL)
        changed = tokens_bL.clone()
        changed[0, 2] = 5
        changed[:, -1] = 7  # behind the end
        second = tower(changed)
    assert not torch.allclose(first[0], second[0], atol=1e-4)
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize("text", [{"pool": "last"}, {"mask_padding": False}, {"pool": "last", "causal": True}], ids=str)
def test_towers_that_see_padding_get_all_of_it(text: dict[str, Any], clip: dict[str, Any]) -> None:
    clip["towers"]["text"] |= text
    assert parse(clip).caption_padding == "context_length"
    assert load_batches(clip, stop=1)[0].inputs["text"].shape == (12, 8)
    clip["data"]["caption_padding"] = "longest"
    with pytest.raises(ConfigError, match=r"data\.caption_padding: found longest, but towers\.text sees the padding"):
        parse(clip)


def test_workers_and_ranks_pad_the_same_captions(clip: dict[str, Any], named: dict[str, str]) -> None:
    """Parts of unequal length make one batch, and the samples stay a function of seed and step."""
    clip["data"] |= {"context_length": 40, "tokenizer": named["open_clip"], "caption_padding": "context_length"}
    full = load_batches(clip, stop=3)
    clip["data"]["caption_padding"] = "longest"
    one = load_batches(clip, stop=3)
    samples = open_run(clip)
    two = list(loader_of(clip, samples, stop=3, plan=WorkerPlan(2, 2, 1, 10**4)))
    for whole, batch, joined in zip(full, one, two, strict=True):
        length = batch.inputs["text"].shape[1]
        assert length == 8 < whole.inputs["text"].shape[1]
        assert whole.inputs["text"][:, :length].equal(batch.inputs["text"])
        assert joined.inputs["text"].equal(batch.inputs["text"])


def test_parts_of_unequal_length_are_joined() -> None:
    def part(tokens: Tensor) -> Batch:
        return Batch({"text": tokens}, {}, torch.arange(len(tokens)), (), pad_id=9)

    rows = [torch.tensor([[1, 2]]), torch.tensor([[1, 1, 1, 2], [1, 2, 9, 9]]), torch.tensor([[2]])]
    joined = join_parts([part(tokens) for tokens in rows], samples=5)
    assert joined.inputs["text"].tolist() == [[1, 2, 9, 9], [1, 1, 1, 2], [1, 2, 9, 9], [2, 9, 9, 9]]


@pytest.mark.parametrize("kind", ["sentencepiece", "hf", "open_clip"])
def test_a_run_keeps_its_tokenizer_and_refuses_another(
    kind: str, clip: dict[str, Any], named: dict[str, str], tmp_path: Path
) -> None:
    clip["data"]["tokenizer"] = named[kind]
    folder = RunFolder(finished_run(clip))
    tokenizer = load_named_tokenizer(named[kind])
    facts = json.loads(folder.tokenizer_digest.read_text())
    assert (facts["name"], facts["digest"]) == (named[kind], tokenizer.digest)
    assert (facts["end"], facts["pad"]) == (tokenizer.special.end, tokenizer.special.pad)
    folder.check_tokenizer(tokenizer)
    other = load_named_tokenizer(named["hf" if kind != "hf" else "open_clip"])
    with pytest.raises(ConfigError, match=r"found the tokenizer .*, expected .*, which this run began with; restore"):
        folder.check_tokenizer(other)

    trained = load_model(folder.path)
    assert trained.tokens(CAPTIONS).equal(tokenizer.encode(CAPTIONS, 8))
    encoder = load_frozen_encoder(f"run:{folder.path}").side("text")
    torch.testing.assert_close(
        torch.nn.functional.normalize(encoder.embed(CAPTIONS, "projected").float(), dim=-1),
        trained.encode_texts(CAPTIONS),
        rtol=1e-5,
        atol=1e-5,
    )
    assert encoder.model.processing.tokenizer_digest == tokenizer.digest
    export(folder.path, tmp_path / "export")
    assert (
        load_model(tmp_path / "export")
        .encode_texts(CAPTIONS)
        .equal(load_model(folder.path, precision="float32").encode_texts(CAPTIONS))
    )

    facts["digest"] = "0" * 64
    folder.tokenizer_digest.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"expected .* \(sha256 000000000000\), which this run began with"):
        load_model(folder.path)


def test_a_tower_of_a_run_on_another_tokenizer_is_noted(clip: dict[str, Any], named: dict[str, str]) -> None:
    run = finished_run(clip)
    clip["towers"]["text"]["init"] = f"run:{run}"
    assert not list(other_vocabularies(parse(clip), load_named_tokenizer(named["sentencepiece"])))
    (line,) = other_vocabularies(parse(clip), load_named_tokenizer(named["hf"]))
    assert line.startswith(f"warning: towers.text.init: {run} was trained on another tokenizer than hf:")


def test_open_clip_tokenizes_an_export_as_its_run_did(
    clip: dict[str, Any], named: dict[str, str], tmp_path: Path
) -> None:
    clip["towers"]["text"] |= {"causal": True, "norm_eps": 1e-5}
    clip["data"]["tokenizer"] = named["hf"]
    assert export(finished_run(clip), tmp_path / "hf-export", "open_clip").difference < 1e-5
    clip["data"]["tokenizer"] = named["open_clip"]
    clip["output_dir"] = str(tmp_path / "of-clip")
    run = finished_run(clip)
    assert export(run, tmp_path / "export", "open_clip").difference < 1e-5
    import open_clip

    trained = load_model(run, precision="float32")
    tokens_bL = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'export'}")(CAPTIONS)
    assert tokens_bL.equal(trained.tokens(CAPTIONS))


@pytest.mark.distributed
def test_training_with_a_tokenizer_of_transformers(clip: dict[str, Any], named: dict[str, str], tmp_path: Path) -> None:
    """Padded or not the losses are the same; the folder is complete; a changed tokenizer ends the next launch."""
    clip["data"] |= {"tokenizer": named["hf"], "context_length": 24, "caption_padding": "longest"}
    file, out = write_config(clip, tmp_path, "run")
    result = run_command([*TRAIN, file])
    page = result.stdout + result.stderr
    assert "tokenizer: hf:" in page
    assert "15 ids (start 2, end 3, padding 0, unknown 1), sha256 " in page
    assert "captions: padded to the longest, 24 at most tokens" in page
    run_command([*TRAIN, file, "data.caption_padding=context_length", f"output_dir={tmp_path / 'full'}"])
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(tmp_path / "full")), rtol=1e-5, atol=1e-5)
    assert load_model(out).encode_texts(["a red disc"]).shape == (1, 16)

    tokenizer = tmp_path / "hf" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"disc"', '"disk"'))
    again = subprocess.run([*TRAIN, file], env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert again.returncode == 2
    last = again.stderr.strip().splitlines()[-1]
    assert f"{out}: found the tokenizer {named['hf']} (sha256 " in last
    assert last.endswith("which this run began with; restore that tokenizer, or choose another `output_dir`")
