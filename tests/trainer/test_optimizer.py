"""Parameter groups, schedules, and Adafactor against a slow reference."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.small_models import model_of
from tests.trainer.test_config import THREE
from threetowers.trainer.config import ConfigError, Duration, Optim, parse
from threetowers.trainer.optimizer.adafactor import Adafactor, factored_sides
from threetowers.trainer.optimizer.optimizer import freeze, parameter_groups
from threetowers.trainer.optimizer.schedule import Schedule


def rates(total: int = 100, samples: int = 1000, batch: int = 100, **optim: Any) -> list[float]:
    schedule = Schedule.of(Optim(lr=2.0, **optim), total, samples, batch)
    return [schedule.rate(step) for step in range(total)]


def test_warmup_and_cosine() -> None:
    found = rates(warmup=0.1)
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10)
    np.testing.assert_allclose(found[10:], [1 + math.cos(math.pi * k / 90) for k in range(90)])
    np.testing.assert_allclose(rates(warmup=0.0, lr_end=0.5)[50], 1.5)
    for span in (Duration(steps=10), Duration(samples=1000), Duration(epochs=1), Duration(percent=10)):
        assert rates(warmup=span) == found


def test_constant_and_rsqrt_with_cooldown() -> None:
    found = rates(warmup=0.0, schedule="constant", cooldown=Duration(steps=4))
    assert found[:97] == [2.0] * 97
    np.testing.assert_allclose(found[97:], [1.5, 1.0, 0.5])
    found = rates(warmup=0.25, schedule="rsqrt")
    assert found[24] == 2.0  # warm-up ends where the root begins
    np.testing.assert_allclose(found[99], 2.0 * math.sqrt(25 / 100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optim": {"warmup": {"steps": 3, "epochs": 1}}},
            r"optim\.warmup: found epochs, steps, expected exactly one",
        ),
        ({"optim": {"cooldown": 0.1}}, r"a cosine decays by itself"),
        ({"duration": {"percent": 5}}, "percent, which is relative to the run"),
        ({"evaluation": {"tars": ["a.tar"], "every": {}}}, r"evaluation\.every: found none, expected exactly one of"),
        ({"log": {"profile": [7, 3]}}, r"expected the first and the last step, found \(7, 3\)"),
    ],
)
def test_spans_that_say_nothing(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(THREE | change)


def test_parameter_groups_by_name() -> None:
    config = copy.deepcopy(THREE)
    config["optim"] = {
        "lr": 0.1,
        "weight_decay": 0.3,
        "param_groups": [
            {"match": "towers.image.model.blocks.0.*", "lr": 0},
            {"match": "towers.image.*", "lr": 0.5, "weight_decay": 0.01},
        ],
    }
    run, model = parse(config), model_of(config)
    freeze(model, run.optim)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        (g["lr_factor"], g["weight_decay"]): {names[id(p)] for p in g["params"]}
        for g in parameter_groups(model, run.optim)
    }
    assert list(groups) == [(1.0, 0.3), (1.0, 0.0), (0.5, 0.01), (0.5, 0.0)]
    assert "log_scales.scale" in groups[1.0, 0.0]
    assert "towers.text.norm.weight" in groups[1.0, 0.0]
    assert "towers.text.embed.weight" in groups[1.0, 0.3]
    assert all(name.startswith("towers.image.") for name in groups[0.5, 0.01] | groups[0.5, 0.0])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert frozen == {name for name in names.values() if name.startswith("towers.image.model.blocks.0.")}
    assert set().union(*groups.values()) | frozen == set(names.values())
    with pytest.raises(
        ConfigError, match=r"optim\.param_groups: 'towers\.img\.\*' matches no parameter; there are \d+, such as"
    ):
        parameter_groups(model, Optim(param_groups=[{"match": "towers.img.*"}]))  # type: ignore[list-item]
    nothing = Optim(param_groups=[{"match": "*", "lr": 0}])  # type: ignore[list-item]
    freeze(model, nothing)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        parameter_groups(model, nothing)


def slow_adafactor(p: Any, grads: list[Any], lr: float, beta1: float, beta2: float, decay: float) -> Any:
    """The published update, a matrix at a time, in float64; momentum rounded to bfloat16 as it is kept."""
    p, m = p.copy(), np.zeros_like(p)
    rows, columns, second = np.zeros(p.shape[0]), np.zeros(p.shape[-1]), np.zeros_like(p)
    factored = min(p.shape) >= 32
    for t, g in enumerate(grads, start=1):
        b = min(beta2, 1 - t**-0.8)
        if factored:
            rows = b * rows + (1 - b) * (g**2 + 1e-30).mean(1)
            columns = b * columns + (1 - b) * (g**2 + 1e-30).mean(0)
            estimate = np.outer(rows, columns) / rows.mean()
        else:
            second = b * second + (1 - b) * (g**2 + 1e-30)
            estimate = second
        m = beta1 * m + (1 - beta1) * g / np.sqrt(estimate)
        p = p - lr * decay * p - lr * m
        m = torch.tensor(m).to(torch.bfloat16).double().numpy()
    return p


@pytest.mark.parametrize("shape", [(33, 40), (40, 33), (31, 64), (7, 5)])
def test_adafactor_matches_its_formula(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=shape), [rng.normal(size=shape) * 10.0**k for k in (0, -3, 2, 1)]
    expected = slow_adafactor(start, grads, 0.1, 0.9, 0.6, 0.05)
    p = torch.nn.Parameter(torch.tensor(start))
    optimizer = Adafactor([p], lr=0.1, betas=(0.9, 0.6), weight_decay=0.05)
    for grad in grads:
        p.grad = torch.tensor(grad)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_adafactor_keeps_factored_moments() -> None:
    convolution = torch.nn.Parameter(torch.zeros(64, 48, 3, 3))
    assert factored_sides(convolution) == (1, 0)
    assert factored_sides(torch.zeros(48, 3, 3, 3)) is None
    assert factored_sides(torch.zeros(512)) is None
    convolution.grad = torch.ones_like(convolution)
    optimizer = Adafactor([convolution], betas=(0.9, 0.99))
    optimizer.step()
    state = optimizer.state[convolution]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert (state["row"].shape, state["column"].shape) == ((1, 48, 3, 3), (64, 1, 3, 3))
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        (
            {"warmup": Duration(steps=400)},
            "400 steps is not shorter than the run of 100: .* to 0.0005 of optim.lr",
        ),
        ({"warmup": 0.6, "cooldown": 0.5, "schedule": "constant"}, "do not both fit into the run"),
        ({"warmup": 0.6, "cooldown": 0.4, "schedule": "constant"}, None),
        ({}, None),
    ],
)
def test_spans_that_do_not_fit_into_the_run_are_told(spans: dict[str, Any], problem: str | None) -> None:
    found = Schedule.of(Optim(lr=0.002, **spans), 100, 1000, 10).problems()
    assert len(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])
