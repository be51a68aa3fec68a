"""Steps run under their limits, one failure stops nothing, and the summary says what happened."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.predictions import Prediction
from tests.gpu.runner import Outcome, Step
from tests.gpu.summary import summarize

STEPS = {
    "good": "def run(setting):\n    setting.record('answer', 42, 'ms')\n    setting.skip('the rest', 'needs a GPU')",
    "bad": "def run(setting):\n    print('about to fail')\n    raise ValueError('no good')",
    "endless": """
        import subprocess, sys, time
        from pathlib import Path

        def run(setting):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (setting.scratch / "child").write_text(str(child.pid))
            print("waits", flush=True)
            time.sleep(600)
    """,
    "dying": "import os\ndef run(setting):\n    os.abort()",
    "beside": "import time\ndef run(setting):\n    time.sleep(0.5)\n    (setting.scratch / 'made').write_text('x')",
    "after": "def run(setting):\n    assert (setting.scratch / 'made').exists()",
}
PROGRAM = """
import json, sys
from pathlib import Path
from tests.gpu import runner
from tests.gpu.runner import Runner, Step
runner.SHORTEST = 0.1
runner.REHEARSAL_PATIENCE = 1
folder, seconds, steps = Path(sys.argv[1]), float(sys.argv[2]), json.loads(sys.argv[3])
made = Runner(folder, folder, seconds, True, "toy_steps")
outcomes = made.run([Step(**step) for step in steps])
print(json.dumps([[o.step.module, o.state, o.seconds, o.tail, o.wrong] for o in outcomes]))
"""


def run_steps(folder: Path, *steps: dict[str, Any], seconds: float = 60) -> dict[str, list[Any]]:
    """Run toy steps in a process of their own, and return how each ended, by name."""
    package = folder / "toy_steps"
    package.mkdir()
    for name, text in STEPS.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    whole = [{"limit": 20, "shows": "nothing", **step} for step in steps]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{PROGRAM}"]
    arguments = [str(folder), str(seconds), json.dumps(whole)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    return {name: rest for name, *rest in rows}


def runs(process: str) -> bool:
    """Whether a process with this number runs; one that has ended may still wait for its parent to notice."""
    status = Path("/proc", process, "status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_no_failure_stops_the_steps_after_it(tmp_path: Path) -> None:
    found = run_steps(
        tmp_path,
        {"module": "bad", "checks": True},
        {"module": "dying"},
        {"module": "endless", "limit": 1.0},
        {"module": "good", "checks": True},
    )
    states = {name: state for name, (state, *_) in found.items()}
    assert states == {"bad": "FAILED", "dying": "FAILED", "endless": "OUT OF TIME", "good": "ok"}
    assert "about to fail" in found["bad"][2]
    assert found["bad"][2].endswith("ValueError: no good")
    assert found["endless"][2] == "waits"
    assert {name for name, (*_, wrong) in found.items() if wrong} == {"bad"}
    assert not runs((tmp_path / "child").read_text())  # nor does what it had started
    log = (tmp_path / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("#####")] == [f"{name}:" for name in found]


def test_steps_share_the_time(tmp_path: Path) -> None:
    found = run_steps(tmp_path, {"module": "endless"}, {"module": "good", "checks": True}, seconds=1.0)
    assert found["endless"][0] == "OUT OF TIME"
    assert found["good"][0] == "NOT RUN"
    assert found["good"][3]  # what was to be checked was not


def test_a_timed_step_waits_for_what_runs_beside(tmp_path: Path) -> None:
    found = run_steps(
        tmp_path,
        {"module": "beside", "background": True, "timed": False},
        {"module": "good", "timed": False},
        {"module": "after"},
    )
    assert {name: state for name, (state, *_) in found.items()} == dict.fromkeys(("beside", "good", "after"), "ok")


def test_the_summary_has_each_prediction_beside_its_measurement(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    rows = [
        {"step": "a", "figure": "stats", "value": 120.0, "unit": "us"},
        {"step": "a", "figure": "sum", "value": 3.0, "unit": "ms"},
        {"step": "b", "skipped": "ncu", "why": "needs a GPU"},
        {"step": "b", "state": "ok", "seconds": 1.0},
    ]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = [
        Outcome(Step("a", 9, "kernels", checks=True), "FAILED", 2.0, "Traceback\nAssertionError: off"),
        Outcome(Step("b", 9, "counters"), "ok", 1.0, "fine"),
    ]
    predictions = {"stats": Prediction(80, 100), "never": Prediction(1, 2)}
    lines = [" ".join(line.split()) for line in summarize(outcomes, results, predictions).splitlines()]
    assert "a FAILED 2.0 s checks: kernels" in lines
    assert "b ok 1.0 s measures: counters" in lines
    assert "stats 80 to 100 120 us 1.20 x the upper end" in lines
    assert "sum 3 ms" in lines
    assert lines[lines.index("Predicted, not measured") + 1] == "never"
    assert lines[lines.index("Not done") + 1] == "b: ncu: needs a GPU"
    assert lines[lines.index("The end of a, FAILED") + 2] == "AssertionError: off"
    assert "fine" not in lines


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(5.0, "as predicted"), (10.0, "as predicted"), (2.5, "0.50 x the lower end"), (15.0, "1.50 x the upper end")],
)
def test_verdicts(value: float, verdict: str) -> None:
    assert Prediction(5, 10).verdict(value) == verdict
