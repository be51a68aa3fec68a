"""Time by phase: warm-up apart, kept over launches, and the bottleneck."""

import time

import pytest

from threetowers.trainer.monitoring.metrics import Metrics, step_line
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


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of a run of 1,000 steps with an evaluation every 100, that pauses, resumes and slows down."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def run(timer: Timer, first: int, last: int, seconds: float) -> None:
        nonlocal now
        for step in range(first, last + 1):
            with timer.phase("step"):
                now += seconds * (1 if timer.warm else 20)
            timer.count_step(images=10)
            if step % 100 == 0:
                with timer.phase("evaluation"):
                    now += 50.0

    first = Timer()
    assert first.time_left(1, 1000) is None
    run(first, 1, 99, 2.0)
    assert first.time_left(99, 1000) == pytest.approx(901 * 2.0)
    run(first, 100, 500, 2.0)
    assert first.time_left(500, 1000) == pytest.approx(500 * (2.0 + 50 / 100))
    second = Timer(first.state())  # on a machine half as fast
    run(second, 501, 502, 4.0)
    assert second.time_left(502, 1000) is None
    run(second, 503, 504, 4.0)
    assert second.time_left(504, 1000) == pytest.approx(496 * (4.0 + 250 / 504))
    run(second, 505, 900, 1.0)  # nothing is left of the slow steps after a few hundred
    assert second.time_left(900, 1000) == pytest.approx(100 * (1.0 + 50 / 100), rel=0.1)
    assert second.time_left(1000, 1000) == 0


def test_the_step_line_ends_with_the_time_left() -> None:
    numbers = ["step", "epoch", "loss", "lr", "images_per_s", "memory_gb", "data_wait"]
    metrics: Metrics = dict.fromkeys(numbers, 1) | dict.fromkeys(["grad_norm", "tflops_per_s"], None)
    metrics |= {"skipped_samples": 0, "nonfinite_steps": 0}
    assert step_line(metrics, 9).endswith(" | data 100%")  # while it is not known
    assert step_line(metrics | {"seconds_left": 0.0}, 9).endswith(" | data 100%")
    assert step_line(metrics | {"seconds_left": 3723.4}, 9).endswith(" | data 100% | 1:02:03 left")


@pytest.mark.parametrize(
    ("data", "step", "bottleneck"), [(1.0, 3.0, "data-bound: 25%"), (1.0, 99.0, "compute-bound: 1.0%")]
)
def test_bottleneck(data: float, step: float, bottleneck: str) -> None:
    assert Timer({"data": data, "step": step, "evaluation": 500.0, "images": 7}).bottleneck().startswith(bottleneck)


def test_no_bottleneck_before_warm_up_is_over() -> None:
    timer = Timer()
    spend(timer, WARM_UP_STEPS, 0.001, 0.001)
    assert timer.bottleneck() == "rate and bottleneck unknown: no steps after warm-up"
