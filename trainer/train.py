"""The training loop: set up once, then fetch, forward and backward, agree, step, report, evaluate, save."""

import json
import logging
import resource
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed

from threetowers.cache.preemption import Interrupted, StopRequest
from threetowers.cache.storage.atomic import write_atomic
from threetowers.cache.webdataset.sample import BadSample
from threetowers.cache.world import World
from threetowers.trainer.checkpoint import checkpoint
from threetowers.trainer.config import CacheTower, TrainConfig
from threetowers.trainer.data.batch import Batch, prefetch_to_device
from threetowers.trainer.data.cache_join import CacheJoin
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.engine import chunks, deepspeed_config, join_process_group, start_engine
from threetowers.trainer.estimate.cost import TeacherCost, meta_model, tower_costs, training_flops
from threetowers.trainer.estimate.summary import Held, startup_page
from threetowers.trainer.evaluator import Evaluator
from threetowers.trainer.grad_cache import Measured, accumulate
from threetowers.trainer.loss import TermResult, objective
from threetowers.trainer.model.model import Outputs, TowerModel
from threetowers.trainer.monitoring.metrics import Metrics, MetricsLog, step_line
from threetowers.trainer.monitoring.profile import StepProfile
from threetowers.trainer.monitoring.timer import Clock
from threetowers.trainer.nonfinite import GradientWatch
from threetowers.trainer.optimizer.optimizer import freeze
from threetowers.trainer.optimizer.schedule import Schedule
from threetowers.trainer.run_folder import RunFolder
from threetowers.trainer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSummary:
    """What a finished run took, over all its launches; steps that were made again after a crash count once."""

    steps: int
    samples: int
    epochs: float
    seconds: float  # of training: steps, waiting for their data, warm-up
    warmup_seconds: float
    evaluation_seconds: float
    checkpoint_seconds: float
    images_per_s: float  # after warm-up
    data_wait: float  # share of the training time, after warm-up, spent waiting for data
    verdict: str
    memory_gb: float  # this process at its peak, since its start
    skipped: int  # samples that could not be read, on this rank
    not_finite: int  # steps skipped because a loss or gradient was not finite


def train(run: TrainConfig, evaluators: Sequence[Evaluator] = ()) -> TrainSummary:
    """Train a run to its end and leave its folder complete; resume it if the folder holds a checkpoint of it.

    Collective: every rank of the launch calls it. Raises ConfigError, ContractError, BadSample or BadTar before the
    first step for a config, cache or tars that do not fit, FloatingPointError when a loss or gradient is not finite
    and the run's policy does not let it go on, and Interrupted after SIGTERM, once a checkpoint is written.
    """
    return Trainer(run, join_process_group(), evaluators).train()


class Trainer:
    """One rank's view of a run."""

    def __init__(self, run: TrainConfig, world: World, evaluators: Sequence[Evaluator] = ()) -> None:
        self.run = run
        self.world = world
        self.folder = RunFolder(Path(run.output_dir))
        changed = self.folder.check(run)
        self.samples = open_samples(run, self.folder.path)
        caches = self.samples.caches
        manifests = {name: join.cache.manifest for name, join in caches.items()}
        self.folder.check_manifests(manifests)
        self.tokenizer = Tokenizer.load(run.data.tokenizer)
        self.vocab_size = self.tokenizer.embedding_rows(run.data.vocab_size)
        self.steps = run.duration.in_steps(len(self.samples), run.global_batch_size)
        self.schedule = Schedule.of(run.optim, self.steps, len(self.samples), run.global_batch_size)
        self.evaluators = [(e.every(len(self.samples), run.global_batch_size, self.steps), e) for e in evaluators]
        model = self._model(caches)
        config = deepspeed_config(run, world.size)
        if world.first:
            samples, teachers = self.samples, {name: TeacherCost.of(manifest) for name, manifest in manifests.items()}
            counts = samples.left_out, samples.without_row
            held = Held(len(samples), samples.total, len(samples.tars), *counts, samples.notes())
            shapes = meta_model(run, self.vocab_size, teachers)
            self.flops = training_flops(shapes, tower_costs(shapes))
            for line in startup_page(world.size, world.device, shapes, teachers, held, self.steps):
                logger.info(line)
            for difference in changed:
                logger.info(f"changed since this run began: {difference}")
            self.folder.create(run, config, manifests)
            checkpoint.sweep(self.folder.checkpoints)
        distributed.barrier()
        path = checkpoint.newest(self.folder.checkpoints)
        saved = None if path is None else checkpoint.Saved(path)
        if saved is not None:
            saved.load_model(model)
        self.engine = start_engine(model, run, config)
        if saved is not None:
            saved.load_optimizer(self.engine)
        progress = checkpoint.Progress(0, 0) if saved is None else saved.progress
        self.start, self.updates = progress.step, progress.updates
        self.counts: Counter[str] = Counter(progress.counts)
        self.clock = Clock(progress.clock)
        self.watch = GradientWatch(self.engine.module, world.device)
        self.failed = 0  # steps in a row that were not finite

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.samples) // self.run.global_batch_size)

    def train(self) -> TrainSummary:
        log = MetricsLog(self.folder.path, self.start, self.run.log.tensorboard) if self.world.first else None
        profile = StepProfile(self.run.log.profile if self.world.first else None, self.folder.profile)
        saved_at = time.monotonic()
        with StopRequest().listening() as request, closing(self._batches()) as batches:
            for step in range(self.start, self.steps):
                done, last = step + 1, step + 1 == self.steps
                profile.before(done)
                with self.clock.during("data"):
                    batch = next(batches)
                self._judge(batch)
                with self.clock.during("step"):
                    measured, rate = self._gradients(step, batch)
                    bad, (stop, overdue) = self.watch.agree([request.received, self._overdue(saved_at)])
                    self._update(step, measured, bad)
                self.clock.stepped(self.run.global_batch_size)
                profile.after(done, last)
                if log is not None and (last or done % self.run.log.every_steps == 0):
                    self._report(log, done, measured, rate)
                self._evaluate(log, done)
                if last or stop or overdue or done % (self.run.checkpoint.every_steps or self.steps) == 0:
                    self._save(done)
                    saved_at = time.monotonic()
                if stop and not last:
                    raise Interrupted(
                        f"stopped by SIGTERM after step {done} of {self.steps}; the same command goes on from there"
                    )
        if log is not None:
            log.close()
        return self._finish()

    def _gradients(self, step: int, batch: Batch) -> tuple[Measured, float]:
        """Leave the step's gradients in the engine, where everything is finite; return what was measured."""
        rate = self.schedule.rate(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        masked = self.run.loss.mask_false_negatives
        concepts_b = batch.groups_b.to(self.world.device, non_blocking=True) if masked else None
        present = {name: has_b.to(self.world.device, non_blocking=True) for name, has_b in batch.present.items()}

        def loss(outputs: Outputs) -> tuple[Tensor, dict[str, TermResult]]:
            return objective(self.run, outputs, concepts_b, present=present)

        def seed(chunk: int) -> None:
            seed_dropout(self.run.seed, step, self.world.rank, chunk)

        parts = chunks(self.run, self.world.size)
        return accumulate(self.engine, batch.inputs, loss, parts, seed, self.world.device), rate

    def _update(self, step: int, measured: Measured, bad: Sequence[str]) -> None:
        """Change the weights; or not, on all ranks, where a loss or gradient is not finite."""
        faults = [*measured.faults, *(f"gradient of {name}" for name in bad)]
        if not faults:
            self.engine.step()
            self.updates += 1
            self.failed = 0
            return
        self.failed += 1
        self.counts["not_finite"] += 1
        engine = self.run.engine
        message = f"step {step + 1}: not finite: {', '.join(faults[:5])}{', ...' if len(faults) > 5 else ''}"
        if engine.on_nonfinite == "stop" or self.failed >= engine.nonfinite_limit:
            raise FloatingPointError(
                f"{message}; the weights are as after {self.updates} updates"
                f"{f', {self.failed} steps in a row were skipped' if self.failed > 1 else ''}. "
                "Lower optim.lr or loss.scale_max, set optim.grad_clip_norm, or skip a few such steps by "
                "engine.on_nonfinite: skip"
            )
        logger.warning(f"{message}; skipped ({self.failed} in a row, at most {engine.nonfinite_limit})")
        if not measured.faults:
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        """DeepSpeed's wrappers have begun to sum what came; they forget it in a step that they find not finite."""
        if self.run.engine.zero_stage == 0 and self.run.engine.precision == "float32":
            self.engine.zero_grad()
            return
        self.engine.step()
        assert not self.engine.was_step_applied()

    def _overdue(self, saved_at: float) -> bool:
        minutes = self.run.checkpoint.every_minutes
        return minutes is not None and self.world.first and time.monotonic() - saved_at >= 60 * minutes

    def _judge(self, batch: Batch) -> None:
        if not batch.bad:
            return
        if self.run.data.on_bad == "error":
            raise BadSample(f"{batch.bad[0]}; set data.on_bad: skip to train without such samples")
        for reason in batch.bad:
            logger.warning(f"skipped: {reason}")
        if not len(batch):
            raise BadSample(f"none of the {len(batch.bad)} samples of a batch could be read; the first: {batch.bad[0]}")
        self.counts["skipped"] += len(batch.bad)

    def _report(self, log: MetricsLog, done: int, measured: Measured, rate: float) -> None:
        norm, lap = self.engine.get_global_grad_norm(), self.clock.lap()
        metrics: Metrics = {
            "step": done,
            "epoch": done / self.steps_per_epoch,
            "samples": done * self.run.global_batch_size,
            "loss": measured.loss,
            "lr": rate,
            "grad_norm": None if norm is None else float(norm),
            "images_per_s": lap.images_per_s,
            "tflops_per_s": lap.images_per_s * self.flops / 1e12,  # of towers and heads, on all ranks
            "data_wait": lap.data_wait,
            "seconds": self.clock.training,
            "memory_gb": peak_memory(self.world.device),
            "skipped": self.counts["skipped"],
            "not_finite": self.counts["not_finite"],
        }
        for name, term in measured.terms.items():
            metrics |= {f"terms/{name}/{key}": value for key, value in term.metrics().items()}
        metrics |= self.samples.mixture_metrics(done)
        log.write(metrics)
        logger.info(step_line(metrics, self.steps))

    def _evaluate(self, log: MetricsLog | None, done: int) -> None:
        due = [evaluator for every, evaluator in self.evaluators if done % every == 0 or done == self.steps]
        if not due:
            return
        with self.clock.during("evaluation"), self._whole_model() as model:
            for evaluator in due:
                found = evaluator(model, done)
                if log is not None:
                    log.write({"step": done} | {f"{evaluator.name}/{key}": value for key, value in found.items()})
                    numbers = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                    logger.info(f"step {done}/{self.steps} | {evaluator.name}: {numbers}")

    @contextmanager
    def _whole_model(self) -> Iterator[TowerModel]:
        """The model in evaluation mode with all its parameters: a copy of its own under ZeRO 3, which cuts them."""
        import deepspeed

        module: TowerModel = self.engine.module
        model = module
        if self.run.engine.zero_stage == 3:
            model = self._bare_model().to(self.world.device)
            with deepspeed.zero.GatheredParameters(list(module.parameters())):
                model.load_state_dict(module.state_dict())
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            module.train()

    def _save(self, step: int) -> None:
        with self.clock.during("checkpoint"):
            progress = checkpoint.Progress(step, self.updates, dict(self.counts), self.clock.state())
            checkpoint.save(self.engine, self.folder.checkpoints, progress, self.run.checkpoint.keep, self.world)

    def _finish(self) -> TrainSummary:
        if self.start == self.steps and self.folder.summary.exists():  # nothing was left to do
            return TrainSummary(**json.loads(self.folder.summary.read_text()))
        checkpoint.save_weights(self.engine, self.folder.weights, self.world)
        clock = self.clock
        summary = TrainSummary(
            steps=self.steps,
            samples=len(self.samples),
            epochs=self.steps / self.steps_per_epoch,
            seconds=clock.training,
            warmup_seconds=clock.seconds("warm-up"),
            evaluation_seconds=clock.seconds("evaluation"),
            checkpoint_seconds=clock.seconds("checkpoint"),
            images_per_s=clock.images_per_s,
            data_wait=clock.data_wait,
            verdict=clock.verdict(),
            memory_gb=peak_memory(self.world.device),
            skipped=self.counts["skipped"],
            not_finite=self.counts["not_finite"],
        )
        if self.world.first:
            write_atomic(self.folder.summary, json.dumps(asdict(summary), indent=2))
            logger.info(summary.verdict)
        return summary

    def _model(self, caches: dict[str, CacheJoin]) -> TowerModel:
        torch.manual_seed(self.run.seed)  # the same start on every rank
        self._widths = {name: join.cache.dim for name, join in caches.items()}
        model = self._bare_model()
        model.load_initial_weights()
        for name in caches:
            tower = self.run.towers[name]
            if isinstance(tower, CacheTower) and tower.standardize:
                mean, std = self.samples.moments(name)
                model.towers[name].set_moments(torch.from_numpy(mean), torch.from_numpy(std))  # type: ignore[operator]
        freeze(model, self.run.optim)
        if self.run.engine.activation_checkpointing:
            model.checkpoint_activations()
        return model

    def _bare_model(self) -> TowerModel:
        return TowerModel(self.run, self.vocab_size, self._widths)

    def _batches(self) -> Generator[Batch, None, None]:
        """The loader's batches. Its workers end when this is closed; they would not by a signal."""
        world = self.world
        loader = training_loader(self.run, self.samples, self.tokenizer, world.rank, world.size, self.start, self.steps)
        yield from prefetch_to_device(loader, world.device) if self.run.engine.micro_batch_size is None else loader


def seed_dropout(seed: int, step: int, rank: int, chunk: int) -> None:
    """Make what is random in a forward pass a function of (seed, step, rank, chunk), also in a resumed run."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank, chunk]).generate_state(1, np.uint64)[0]))


def peak_memory(device: torch.device) -> float:
    """Return the most memory, in GB, that this process has held: on its GPU where it has one, else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
