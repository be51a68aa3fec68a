"""Time by phase: warm-up apart, kept over launches, and what it says of the bottleneck."""

import time

import pytest

from threetowers.trainer.monitoring.timer import WARM_UP_STEPS, Clock


def spend(clock: Clock, steps: int, data: float, step: float) -> None:
    for _ in range(steps):
        with clock.during("data"):
            time.sleep(data)
        with clock.during("step"):
            time.sleep(step)
        clock.stepped(images=10)


def test_phases_are_kept_apart_and_over_launches() -> None:
    first = Clock()
    spend(first, WARM_UP_STEPS, 0.004, 0.004)
    assert (first.images, first.images_per_s, first.seconds("step")) == (0, 0.0, 0.0)
    assert first.seconds("warm-up") == first.training >= WARM_UP_STEPS * 0.008
    spend(first, 3, 0.002, 0.006)
    with first.during("checkpoint"):
        time.sleep(0.02)
    assert first.images == 30
    assert first.training == pytest.approx(sum(first.seconds(p) for p in ("warm-up", "data", "step")))
    assert first.seconds("checkpoint") >= 0.02
    second = Clock(first.state())
    assert second.state() == first.state()
    spend(second, WARM_UP_STEPS + 1, 0.002, 0.002)  # a launch has a warm-up of its own
    assert second.images == 40
    assert second.seconds("warm-up") > first.seconds("warm-up")
    assert second.seconds("checkpoint") == first.seconds("checkpoint")
    lap = second.lap()
    assert 0 < lap.images_per_s <= 30 / (3 * 0.004)
    assert second.lap().images_per_s == 0


@pytest.mark.parametrize(
    ("data", "step", "verdict"), [(1.0, 3.0, "data-bound: 25%"), (1.0, 99.0, "compute-bound: 1.0%")]
)
def test_verdict(data: float, step: float, verdict: str) -> None:
    assert Clock({"data": data, "step": step, "evaluation": 500.0, "images": 7}).verdict().startswith(verdict)


def test_no_verdict_on_a_warm_up() -> None:
    clock = Clock()
    spend(clock, WARM_UP_STEPS, 0.001, 0.001)
    assert clock.verdict() == "too short to tell what it was bound by"
