"""The training loop: set up once, then fetch, forward, objective, backward, step, report, save."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from threetowers.cache.tars import expand, index_tar
from threetowers.trainer import checkpoint
from threetowers.trainer.atomic import replace_text
from threetowers.trainer.config import CacheTower, Run
from threetowers.trainer.data.join import CacheJoin
from threetowers.trainer.data.loader import Batch, training_loader
from threetowers.trainer.data.samples import BadSample, SampleSet
from threetowers.trainer.engine import Ranks, deepspeed_config, start_engine, start_ranks
from threetowers.trainer.folder import RunFolder
from threetowers.trainer.log import Metrics, MetricsLog, step_line
from threetowers.trainer.objective import TermResult, objective
from threetowers.trainer.schedule import learning_rate
from threetowers.trainer.startup import startup_page
from threetowers.trainer.tokenizer import Tokenizer
from threetowers.trainer.towers.model import TowerModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished run took. Seconds are this process's, since its start or resume."""

    steps: int
    samples: int
    epochs: float
    seconds: float
    images_per_s: float
    data_wait: float  # share of the training time spent waiting for data
    skipped: int  # samples that could not be read, on this rank


@dataclass
class Window:
    """Time and counts since the last logged step."""

    images: int = 0
    skipped: int = 0
    waiting: float = 0.0
    seconds: float = 0.0

    def add(self, other: "Window") -> None:
        self.images += other.images
        self.skipped += other.skipped
        self.waiting += other.waiting
        self.seconds += other.seconds


def train(run: Run) -> Summary:
    """Train a run to its end and leave its folder complete; resume it if the folder holds a checkpoint of it.

    Collective: every rank of the launch calls it. Raises ConfigError, ContractError, BadSample or BadTar before the
    first step for a config, cache or tars that do not fit, and FloatingPointError when a loss is not finite.
    """
    ranks = start_ranks()
    return Trainer(run, ranks).train()


class Trainer:
    """One rank's view of a run."""

    def __init__(self, run: Run, ranks: Ranks) -> None:
        self.run = run
        self.ranks = ranks
        self.folder = RunFolder(Path(run.out))
        self.folder.check(run)
        tars = [index_tar(path) for path in expand(run.data.tars)]
        caches = {
            name: CacheJoin(tower.path, tars, tower.backbone)
            for name, tower in run.towers.items()
            if isinstance(tower, CacheTower)
        }
        contracts = {name: join.cache.contract for name, join in caches.items()}
        self.folder.check_contracts(contracts)
        self.samples = SampleSet(tars, caches, run.data.on_bad)
        self.tokenizer = Tokenizer.load(run.data.tokenizer)
        self.steps = run.duration.in_steps(len(self.samples), run.batch)
        model = self._model(caches)
        config = deepspeed_config(run, ranks.world)
        if ranks.first:
            for line in startup_page(run, ranks, self.samples, model, self.steps, self.steps_per_epoch):
                logger.info(line)
            self.folder.create(run, config, contracts)
        distributed.barrier()
        self.engine = start_engine(model, run, config)
        self.start = checkpoint.resume(self.engine, self.folder.checkpoints, ranks)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.samples) // self.run.batch)

    def train(self) -> Summary:
        began = time.perf_counter()
        total, window = Window(), Window()
        metrics_log = self._metrics_log()
        batches = self._batches()
        for step in range(self.start, self.steps):
            started = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - started
            self._judge(batch)
            loss, terms, rate = self._step(step, batch)
            window.add(Window(self.run.batch, len(batch.bad), waited, time.perf_counter() - started))
            last = step + 1 == self.steps
            if last or (step + 1) % self.run.log.every_steps == 0:
                metrics = self._metrics(step, loss, terms, rate, window)
                if metrics_log is not None:
                    metrics_log.write(metrics)
                    logger.info(step_line(metrics, self.steps))
                total.add(window)
                window = Window()
            every = self.run.checkpoint.every_steps
            if last or (every is not None and (step + 1) % every == 0):
                self._save(step + 1)
        if metrics_log is not None:
            metrics_log.close()
        return self._finish(total, time.perf_counter() - began)

    def _step(self, step: int, batch: Batch) -> tuple[float, dict[str, TermResult], float]:
        rate = learning_rate(self.run.optim, step, self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        seed_dropout(self.run.seed, step, self.ranks.rank)
        batch = batch.to(self.ranks.device)
        outputs = self.engine(batch.inputs)
        masked = self.run.loss.same_concept == "mask"
        loss, terms = objective(self.run, outputs, batch.concepts_b if masked else None)
        value = float(loss.detach())
        if not math.isfinite(value):  # the same on all ranks, so all stop here, before the weights are touched
            parts = ", ".join(f"{name} {float(term.loss):g}" for name, term in terms.items())
            raise FloatingPointError(
                f"step {step + 1}: the loss is {value} ({parts}); the weights are as after step {step}. "
                "Lower optim.lr or loss.scale_max, or set optim.clip"
            )
        self.engine.backward(loss)
        self.engine.step()
        return value, terms, rate

    def _judge(self, batch: Batch) -> None:
        if not batch.bad:
            return
        if self.run.data.on_bad == "error":
            raise BadSample(f"{batch.bad[0]}; set data.on_bad: skip to train without such samples")
        for reason in batch.bad:
            logger.warning(f"skipped: {reason}")
        if not len(batch):
            raise BadSample(f"none of the {len(batch.bad)} samples of a batch could be read; the first: {batch.bad[0]}")

    def _metrics(self, step: int, loss: float, terms: dict[str, TermResult], rate: float, window: Window) -> Metrics:
        norm = self.engine.get_global_grad_norm()
        metrics: Metrics = {
            "step": step + 1,
            "epoch": (step + 1) / self.steps_per_epoch,
            "examples": (step + 1) * self.run.batch,
            "loss": loss,
            "lr": rate,
            "grad_norm": None if norm is None else float(norm),
            "images_per_s": window.images / window.seconds,
            "data_wait": window.waiting / window.seconds,
            "skipped": window.skipped,
        }
        for name, term in terms.items():
            metrics |= {f"terms/{name}/{key}": value for key, value in term.metrics().items()}
        return metrics

    def _save(self, step: int) -> None:
        checkpoint.save(self.engine, self.folder.checkpoints, step, self.run.checkpoint.keep, self.ranks)

    def _finish(self, total: Window, seconds: float) -> Summary:
        if self.start == self.steps and self.folder.summary.exists():  # nothing was left to do
            return Summary(**json.loads(self.folder.summary.read_text()))
        checkpoint.save_weights(self.engine, self.folder.weights, self.ranks)
        summary = Summary(
            steps=self.steps,
            samples=len(self.samples),
            epochs=self.steps / self.steps_per_epoch,
            seconds=seconds,
            images_per_s=total.images / total.seconds if total.seconds else 0.0,
            data_wait=total.waiting / total.seconds if total.seconds else 0.0,
            skipped=total.skipped,
        )
        if self.ranks.first:
            replace_text(self.folder.summary, json.dumps(asdict(summary), indent=2))
        return summary

    def _model(self, caches: dict[str, CacheJoin]) -> TowerModel:
        torch.manual_seed(self.run.seed)  # the same start on every rank
        widths = {name: join.cache.dim for name, join in caches.items()}
        model = TowerModel(self.run, self.tokenizer.vocab_size, widths)
        model.load_initial_weights()
        for name, join in caches.items():
            tower = self.run.towers[name]
            if isinstance(tower, CacheTower) and tower.standardize:
                mean, std = join.moments()
                model.towers[name].set_moments(torch.from_numpy(mean), torch.from_numpy(std))  # type: ignore[operator]
        return model

    def _batches(self) -> Iterator[Batch]:
        ranks = self.ranks
        loader: Any = training_loader(
            self.run, self.samples, self.tokenizer, ranks.rank, ranks.world, self.start, self.steps
        )
        return iter(loader)

    def _metrics_log(self) -> MetricsLog | None:
        if not self.ranks.first:
            return None
        return MetricsLog(self.folder.path, self.start, self.run.log.tensorboard)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make what is random in a forward pass a function of (seed, step, rank): a resumed run draws the same."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)
