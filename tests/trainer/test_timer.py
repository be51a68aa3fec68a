"""Time by phase: warm-up apart, kept over launches, and the bottleneck."""

import time

import pytest

from threetowers.trainer.monitoring.timer import WARM_UP_STEPS, Timer


def spend(timer: Timer, steps: int, data: float, step: float) -> None:
    for _ in range(steps):
        with timer.phase("data"):
            time.sleep(data)
        with timer.phase("step"):
            time.sleep(step)
        timer.count_step(images=10)


def test_phases_are_kept_apart_and_over_launches() -> None:
    first = Timer()
    spend(first, WARM_UP_STEPS, 0.004, 0.004)
    assert (first.images, first.images_per_s, first.seconds("step")) == (0, 0.0, 0.0)
    assert first.seconds("warm-up") == first.training >= WARM_UP_STEPS * 0.008
    spend(first, 3, 0.002, 0.006)
    with first.phase("checkpoint"):
        time.sleep(0.02)
    assert first.images == 30
    assert first.training == pytest.approx(sum(first.seconds(p) for p in ("warm-up", "data", "step")))
    assert first.seconds("checkpoint") >= 0.02
    second = Timer(first.state())
    assert second.state() == first.state()
    spend(second, WARM_UP_STEPS + 1, 0.002, 0.002)  # a launch has a warm-up of its own
    assert second.images == 40
    assert second.seconds("warm-up") > first.seconds("warm-up")
    assert second.seconds("checkpoint") == first.seconds("checkpoint")
    interval = second.interval()
    assert 0 < interval.images_per_s <= 30 / (3 * 0.004)
    assert second.interval().images_per_s == 0


@pytest.mark.parametrize(
    ("data", "step", "bottleneck"), [(1.0, 3.0, "data-bound: 25%"), (1.0, 99.0, "compute-bound: 1.0%")]
)
def test_bottleneck(data: float, step: float, bottleneck: str) -> None:
    assert Timer({"data": data, "step": step, "evaluation": 500.0, "images": 7}).bottleneck().startswith(bottleneck)


def test_no_bottleneck_before_warm_up_is_over() -> None:
    timer = Timer()
    spend(timer, WARM_UP_STEPS, 0.001, 0.001)
    assert timer.bottleneck() == "rate and bottleneck unknown: no steps after warm-up"
