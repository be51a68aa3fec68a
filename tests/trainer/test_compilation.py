"""torch.compile: the gradients and names of the model as it is, in micro-batches, recomputed and under autocast."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.launches import TRAIN, losses, run_command, write_config
from tests.trainer.small_models import VIT, model_of
from tests.trainer.test_grad_cache import gradients, one_process_group, tree
from threetowers.trainer.config import parse
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.compilation import compile_model, log_graph_breaks

__all__ = ["one_process_group"]  # pytest finds fixtures here

# The compiler itself looks at the gradient of every input.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the compiler trace and differentiate as always, but write no machine code, which takes a minute."""
    compiled = torch.compile

    def traced(*args: Any, options: dict[str, Any], **kwargs: Any) -> Any:
        assert options == {"fallback_random": True}
        return compiled(*args, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", traced)
    with torch._dynamo.config.patch(recompile_limit=8):  # puts back what the test makes of it
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("parts", "engine"), [("blocks", {}), ("model", {"precision": "mixed", "activation_checkpointing": True})]
)
def test_gradients_and_names_stay(
    parts: Any, engine: dict[str, Any], one_process_group: None, without_code: None, caplog: pytest.LogCaptureFixture
) -> None:
    """In two micro-batches with dropout: both passes over one, compiled apart, must draw the same."""
    config = tree(**engine)
    config["towers"]["image"] = VIT | {"args": VIT["args"] | {"depth": 1, "proj_drop_rate": 0.3}}
    config["towers"]["text"] |= {"dropout": 0.3}
    plain, compiled = model_of(config), model_of(config)
    for model in (plain, compiled):
        if engine:
            model.checkpoint_activations()
    compile_model(compiled, parts)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected = gradients(plain, 2)
    tolerance = 2**-5 if engine else 1e-5  # a fused chain rounds to bfloat16 less often
    for name, grad in gradients(compiled, 2).items():
        assert float((grad - expected[name]).norm()) <= tolerance * float(expected[name].norm()) + 1e-7, name
    with caplog.at_level(logging.INFO):
        log_graph_breaks(parts)
    assert "compiled: " in caplog.text
    assert "compiled: 0 graphs" not in caplog.text


def test_graph_breaks_are_said_with_their_reasons(without_code: None, caplog: pytest.LogCaptureFixture) -> None:
    config = tree()
    config["towers"]["image"] = VIT | {"args": VIT["args"] | {"depth": 1}}
    model = model_of(config).eval()
    block = model.towers["text"].blocks[0]  # type: ignore[union-attr, index]
    block.mlp.register_forward_pre_hook(partial(_branch_on_a_value))  # type: ignore[union-attr]
    compile_model(model, "blocks")
    model.encode_text({"text": torch.ones(2, 8, dtype=torch.int64)})
    with caplog.at_level(logging.INFO):
        log_graph_breaks("blocks")
    assert "graph break" in caplog.text
    assert "data-dependent" in caplog.text.lower()


def _branch_on_a_value(module: Any, inputs: tuple[torch.Tensor]) -> None:
    if inputs[0].sum() > 1e9:
        raise AssertionError


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_run(clip: dict[str, Any], tmp_path: Path) -> None:
    """With machine code, DeepSpeed and checkpoints: the losses of the run as it is; either goes on from the other."""
    clip["towers"]["image"] = VIT | {"args": VIT["args"] | {"depth": 1}}
    plain = write_config(clip, tmp_path, "plain", zero_stage=1)
    compiled = write_config(clip, tmp_path, "compiled", zero_stage=2, compile="model")
    run_command([*TRAIN, plain[0]])
    result = run_command([*TRAIN, compiled[0], "duration={steps: 3}", "optim.schedule=constant"])
    assert "compiled: 1 graphs, 0 graph breaks" in result.stdout + result.stderr
    np.testing.assert_allclose(np.array(losses(compiled[1]))[:1], np.array(losses(plain[1]))[:1], rtol=1e-4)
    run_command([*TRAIN, compiled[0], "optim.schedule=constant", "engine.compile=false", "engine.zero_stage=1"])
    assert len(losses(compiled[1])) == 6
    names = load_model(compiled[1]).model.state_dict().keys()
    assert names == load_model(plain[1]).model.state_dict().keys()
    assert parse(clip).engine.compile is False
