"""The probes against scikit-learn on the same features: differing predictions, and ratios of times.

    python tests/benchmarks/bench_probe.py                 # both, less than two minutes on two cores
    python tests/benchmarks/bench_probe.py few-shot --rounds 5

few-shot: the complete protocol, 1, 5, 10 and 25 shots of 3 seeds, fitted and predicted; against StandardScaler and
          Ridge(alpha=1024) in float32, the dtype of features, and in float64.
linear:   logistic regression at three penalties; against LogisticRegression at the same tolerance.

The methods run in alternation. Ratios are medians of the ratios of each round, with their quartiles.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from threetowers.eval.metrics.linear_probe import linear_probe
from threetowers.eval.metrics.ridge_probe import L2, SEEDS, SHOTS, draw_support, few_shot_probes

Predictions = dict[tuple[float, ...], NDArray[np.int64]]
TOLERANCE = 1e-5
PENALTIES = (1e-1, 1e-2, 1e-3)


def features(classes: int, width: int, each: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return items of Gaussian classes with correlated features, as those of a network."""
    fixed = np.random.default_rng(0)
    mix = fixed.normal(size=(width, width)) / width**0.5
    centers = 0.25 * fixed.normal(size=(classes, width))
    label = np.repeat(np.arange(classes), each)
    noise = np.random.default_rng(seed).normal(size=(len(label), width))
    return ((centers[label] + noise) @ mix + 1).astype(np.float32), label


def compare_methods(
    title: str, ours: Callable[[], Predictions], peers: Mapping[str, Callable[[], Predictions]], rounds: int
) -> None:
    """Time methods in alternation, and print their ratios and the predictions that differ."""
    print(title)
    methods = {"ours": ours, **peers}
    found = {name: method() for name, method in methods.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            started = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - started)
    print(f"  ours                    {statistics.median(seconds['ours']):7.3f} s")
    for name in peers:
        ratios = sorted(peer / own for peer, own in zip(seconds[name], seconds["ours"], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        other = sum(int((found["ours"][key] != found[name][key]).sum()) for key in found["ours"])
        count = sum(len(one) for one in found["ours"].values())
        print(
            f"  {name:<22}  {statistics.median(seconds[name]):7.3f} s   {statistics.median(ratios):5.2f} x ours "
            f"({low:.2f} to {high:.2f})   {other} of {count:,} predictions differ"
        )


def few_shot(classes: int, width: int, tests: int, rounds: int) -> None:
    """Compare few-shot probes."""
    x, label = features(classes, width, 50, seed=1)
    test, _ = features(classes, width, tests // classes, seed=2)

    def ours() -> Predictions:
        return {
            (probe.seed, probe.shots): np.concatenate([s.argmax(axis=1) for s in probe.classifier.scores(test)])
            for probe in few_shot_probes(x, label, classes)
        }

    def peer(dtype: type) -> Predictions:
        predictions: Predictions = {}
        for seed in SEEDS:
            drawn = draw_support(label, classes, max(SHOTS), seed)
            for shots in SHOTS:
                rows = drawn[:, :shots].ravel()
                scaler = StandardScaler().fit(x[rows].astype(dtype))
                target = np.where(label[rows][:, None] == np.arange(classes), 1, -1).astype(dtype)
                ridge = Ridge(alpha=L2).fit(scaler.transform(x[rows].astype(dtype)), target)
                predictions[seed, shots] = ridge.predict(scaler.transform(test.astype(dtype))).argmax(axis=1)
        return predictions

    peers = {"scikit-learn, float32": lambda: peer(np.float32), "scikit-learn, float64": lambda: peer(np.float64)}
    compare_methods(f"few-shot: D = {width}, {classes} classes, {len(test):,} test items", ours, peers, rounds)


def linear(classes: int, width: int, tests: int, rounds: int) -> None:
    """Compare linear probes."""
    x, label = features(classes, width, 60, seed=1)
    test, _ = features(classes, width, tests // classes, seed=2)

    def ours() -> Predictions:
        probes = {penalty: linear_probe(x, label, classes, [penalty], tolerance=TOLERANCE) for penalty in PENALTIES}
        return {
            (penalty,): np.concatenate([s.argmax(axis=1) for s in probe.classifier.scores(test)])
            for penalty, probe in probes.items()
        }

    def peer() -> Predictions:
        predictions: Predictions = {}
        for penalty in PENALTIES:
            scaler = StandardScaler().fit(x)
            fit = LogisticRegression(C=1 / (penalty * len(x)), tol=TOLERANCE, max_iter=1000)
            predictions[(penalty,)] = fit.fit(scaler.transform(x), label).predict(scaler.transform(test))
        return predictions

    title = f"linear: D = {width}, {classes} classes, {len(x):,} training items, {len(PENALTIES)} penalties"
    compare_methods(title, ours, {"scikit-learn, float32": peer}, rounds)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["few-shot", "linear"], help="default: both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--tests", type=int, default=5000)
    arguments = parser.parse_args()
    print(f"{os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads")
    if arguments.what != "linear":
        few_shot(arguments.classes, arguments.width, arguments.tests, arguments.rounds)
    if arguments.what != "few-shot":
        linear(arguments.classes, arguments.width // 2, arguments.tests, max(1, arguments.rounds // 2))


if __name__ == "__main__":
    main()
