"""Runs steps one after the other, each in a process of its own under its own time limit; a failure stops none of them.

The driver has imported what steps need and never touches CUDA, so a step is a fork of it: nothing is imported again,
which would cost a minute of ten. Where a driver's fork cannot use the GPU, steps start afresh (`spawn`).
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from tests.gpu.setting import Setting

TAIL_LINES = 25
GRACE_SECONDS = 3.0  # between asking a step to end and ending it
SHORTEST = 5.0  # seconds under which a step is not begun
REHEARSAL_PATIENCE = 5.0  # times the limits: the CPU may be busy, and slowness is no failure there

State = Literal["ok", "FAILED", "OUT OF TIME", "NOT RUN"]
StartMethod = Literal["fork", "spawn"]


@dataclass(frozen=True)
class Step:
    """One step: a module of `tests.gpu.steps` with a function `run(setting)`.

    Attributes:
        module: its name; also the step's.
        limit: seconds after which it is ended.
        checks: whether it compares with a reference: then its failure is the program's.
        shows: what it is for, in a few words.
        background: whether it runs beside the steps that follow, up to the first that is timed.
        timed: whether other work beside it would spoil its figures.
        environment: variables that the step's process has beside the driver's.
    """

    module: str
    limit: float
    shows: str
    checks: bool = False
    background: bool = False
    timed: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended, after how many seconds, and the end of what it printed."""

    step: Step
    state: State
    seconds: float
    tail: str

    @property
    def wrong(self) -> bool:
        """Whether a comparison with a reference failed, or was not made."""
        return self.step.checks and self.state != "ok"


class Runner:
    """The time that is left, the log, and the processes that have been started."""

    def __init__(self, output_dir: Path, scratch: Path, seconds: float, rehearse: bool, package: str) -> None:
        """Start the clock.

        Args:
            output_dir: Folder of results.jsonl and log.txt.
            scratch: Folder for what only steps read, and for their logs.
            seconds: That all steps may take together.
            rehearse: Passed on to the steps.
            package: Of the steps' modules.
        """
        self.results = output_dir / "results.jsonl"
        self.results.write_text("")
        self.start_method: StartMethod = "fork"
        self._log = output_dir / "log.txt"
        self._log.write_text("")
        self._scratch = scratch
        self._rehearse = rehearse
        self._package = package
        self._began = time.monotonic()
        self._seconds = seconds

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def run(self, steps: Sequence[Step]) -> list[Outcome]:
        """Run all steps in their order, and return how they ended, in that order."""
        outcomes: dict[str, Outcome] = {}
        beside: list[_Running] = []
        try:
            for step in steps:
                if step.timed:
                    outcomes |= {running.step.module: self._finish(running) for running in beside}
                    beside = []
                running = self._start(step)
                if running is None:
                    outcomes[step.module] = Outcome(step, "NOT RUN", 0.0, "no time was left")
                elif step.background:
                    beside.append(running)
                else:
                    outcomes[step.module] = self._finish(running)
            outcomes |= {running.step.module: self._finish(running) for running in beside}
        finally:
            for running in beside:
                running.end()
        return [outcomes[step.module] for step in steps]

    def _start(self, step: Step) -> "_Running | None":
        patience = REHEARSAL_PATIENCE if self._rehearse else 1.0
        limit = min(step.limit * patience, self._seconds * patience - self.passed)
        if limit < SHORTEST:
            return None
        log = self._scratch / f"{step.module}.log"
        setting = Setting(step.module, self.results, self._scratch, self._rehearse)
        process = multiprocessing.get_context(self.start_method).Process(
            target=_run_step, args=(f"{self._package}.{step.module}", setting, log, dict(step.environment))
        )
        process.start()
        return _Running(step, process, log, time.monotonic(), limit)

    def _finish(self, running: "_Running") -> Outcome:
        """Wait for a step's end or limit, and keep what it printed."""
        step = running.step
        state: State = "OUT OF TIME"
        try:
            running.process.join(max(0.0, running.began + running.limit - time.monotonic()))
            if not running.process.is_alive():
                state = "ok" if running.process.exitcode == 0 else "FAILED"
        finally:
            running.end()
        seconds = time.monotonic() - running.began
        printed = running.log.read_text(errors="replace") if running.log.exists() else ""
        with self._log.open("a") as log:
            log.write(f"##### {step.module}: {state}, {seconds:.1f} s\n{printed}\n")
        with self.results.open("a") as lines:
            lines.write(json.dumps({"step": step.module, "state": state, "seconds": round(seconds, 1)}) + "\n")
        print(f"{self.passed:5.0f} s  {step.module:18} {state:11} {seconds:6.1f} s of {running.limit:.0f}", flush=True)
        return Outcome(step, state, seconds, "\n".join(printed.splitlines()[-TAIL_LINES:]))


@dataclass
class _Running:
    """A step that has been started."""

    step: Step
    process: BaseProcess
    log: Path
    began: float
    limit: float

    def end(self) -> None:
        """End the step's processes, if there still are any: its own, and those that it started."""
        assert self.process.pid is not None
        for sign, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(self.process.pid, sign)  # the step leads a group of this number
            except ProcessLookupError:
                break
            self.process.join(patience)
        self.process.kill()  # had it not yet come to lead its group
        self.process.join()


def _run_step(module: str, setting: Setting, log: Path, environment: Mapping[str, str]) -> None:
    """Run a step in its own process: at the head of a process group, and printing to a file."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the driver's handler
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ |= environment
    try:
        importlib.import_module(module).run(setting)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries' threads and exit handlers have nothing to add
