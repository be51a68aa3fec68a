"""The training loop: set a run up, then fetch, forward and backward, update, log, evaluate and save, step by step."""

import json
import logging
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from threetowers.cache.encoders.tokenizers.names import load_named_tokenizer
from threetowers.cache.encoders.tokenizers.sentencepiece_tokenizer import END
from threetowers.cache.processes.stop_request import StopRequest
from threetowers.cache.processes.worker_processes import worker_context
from threetowers.cache.processes.world import World
from threetowers.cache.storage.atomic import write_atomic
from threetowers.cache.webdataset.defects import BadSample
from threetowers.trainer.checkpoint.checkpoint import (
    CheckpointReader,
    Progress,
    save_checkpoint,
    save_weights,
)
from threetowers.trainer.config import CacheTower, ConfigError, TrainConfig
from threetowers.trainer.data.annotation_survey import survey_annotations
from threetowers.trainer.data.batch import Batch, prefetch_to_device
from threetowers.trainer.data.loader import training_loader
from threetowers.trainer.data.run_samples import open_samples
from threetowers.trainer.data.worker_plan import plan_workers
from threetowers.trainer.engine import deepspeed_config, join_process_group, num_micro_batches, start_engine
from threetowers.trainer.estimate.cost import TrainingFlops
from threetowers.trainer.estimate.summary import DatasetStats, summary_or_reason
from threetowers.trainer.grad_cache import GradCache
from threetowers.trainer.loss import total_loss
from threetowers.trainer.model.compilation import compile_model, log_graph_breaks
from threetowers.trainer.model.initial.vocabularies import other_vocabularies
from threetowers.trainer.model.initial.whole_model import resolve_start
from threetowers.trainer.model.model import TowerModel
from threetowers.trainer.model.running_moments import (
    average_running_moments,
    remember_running_moments,
    running_moments_kept,
)
from threetowers.trainer.model.towers.phi_s import phi_s
from threetowers.trainer.model.towers.tokenizer_fit import check_tokenizer
from threetowers.trainer.monitoring.metrics import MetricsLog, step_line
from threetowers.trainer.monitoring.profile import StepProfile
from threetowers.trainer.monitoring.timer import Timer
from threetowers.trainer.monitoring.tracker import Metrics
from threetowers.trainer.monitoring.train_summary import TrainSummary, peak_memory
from threetowers.trainer.optimizer.agreed_step import AgreedStep, StepReport
from threetowers.trainer.optimizer.optimizer import freeze
from threetowers.trainer.optimizer.schedule import Schedule
from threetowers.trainer.run.run_launch import RunLaunch
from threetowers.trainer.run.run_lease import RunInUse, taken_over
from threetowers.trainer.run.run_store import run_store

FloatArray = npt.NDArray[np.floating[Any]]

logger = logging.getLogger(__name__)

ONE_VALUE = "Expected more than 1 value per channel"  # torch, of batch normalization


class Evaluator(Protocol):
    """An online evaluation. Every rank calls it; it may use collectives.

    The trainer imports no evaluation: the command line hands evaluators in.
    """

    name: str

    def every(self, samples: int, batch: int, steps: int) -> int:
        """Return its interval in steps, in a run of `steps` steps over `samples` with a global batch of `batch`."""
        ...

    def __call__(self, model: TowerModel, step: int) -> Mapping[str, float]:
        """Return metrics of the model after `step` steps; the model is in evaluation mode, its parameters complete."""
        ...


def train(config: TrainConfig, evaluators: Sequence[Evaluator] = ()) -> TrainSummary:
    """Train a run to its end, or resume it where its folder holds a checkpoint.

    The folder (`config.output_dir`) then holds config, tokenizer, weights, metrics and summary; `load_model` reads it.
    Collective: every rank of the launch calls it. Without a launcher it runs as a single process.

    Args:
        config: The run, as returned by `load_config` for a YAML file.
        evaluators: Online evaluations, each called at its own interval and at the end.

    Returns:
        Steps, seconds, images per second, share of time spent waiting for data, and the peak memory in GB.

    Raises:
        ConfigError: The config does not fit the data, the layout, or the run that the folder holds.
        ManifestError: A cache does not fit the config, or is another one than the run began with.
        BadSample, BadTar: A sample or tar cannot be used and `data.on_bad` is `error`.
        FloatingPointError: A loss or gradient is nonfinite and `engine.on_nonfinite` does not allow to skip it.
        Interrupted: SIGTERM or Ctrl-C arrived. Calling `train` again goes on from a checkpoint that was written, or
            from where this launch began if it had not made a step yet.
        RunInUse: Another process trains this run.

    Examples:
        >>> import contextlib, io, tarfile, tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from threetowers.trainer.config import parse
        >>> from threetowers.trainer.tokenizer import train_tokenizer
        >>> folder = Path(tempfile.mkdtemp())
        >>> image = io.BytesIO()
        >>> Image.new("RGB", (32, 32), "red").save(image, "PNG")
        >>> with tarfile.open(folder / "train.tar", "w") as tar:
        ...     for number in range(4):
        ...         for extension, data in (("png", image.getvalue()), ("txt", f"red square {number}".encode())):
        ...             member = tarfile.TarInfo(f"{number}.{extension}")
        ...             member.size = len(data)
        ...             tar.addfile(member, io.BytesIO(data))
        >>> _ = (folder / "tokenizer.model").write_bytes(train_tokenizer(["a red square", "a blue disc"] * 9, 24))
        >>> config = parse({
        ...     "output_dir": str(folder / "run"), "global_batch_size": 4, "duration": {"steps": 2}, "embed_dim": 8,
        ...     "data": {"tars": [str(folder / "train.tar")], "tokenizer": str(folder / "tokenizer.model"),
        ...              "image_size": 32, "context_length": 8, "workers": 0},
        ...     "towers": {"image": {"kind": "timm", "model": "test_vit"},
        ...                "text": {"kind": "text", "width": 8, "depth": 1, "heads": 2}},
        ...     "heads": {"f": {"of": "image"}, "g": {"of": "text"}},
        ...     "terms": {"image-text": {"x": "f", "y": "g"}},
        ...     "deploy": {"image": "f", "text": "g"}, "log": {"tensorboard": False},
        ... })
        >>> with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints
        ...     summary = train(config)
        >>> summary.steps, summary.samples, summary.epochs
        (2, 4, 2.0)
        >>> from threetowers.trainer.export.trained_model import load_model
        >>> load_model(folder / "run").encode_texts(["a red square", "a blue disc"]).shape
        torch.Size([2, 8])
    """
    with StopRequest.of_process().listening():
        return Trainer(config, join_process_group(), evaluators).train()


class Trainer:
    """One rank of a run: its data, model, engine and progress."""

    def __init__(self, config: TrainConfig, world: World, evaluators: Sequence[Evaluator] = ()) -> None:
        """Set the run up, as far as its newest checkpoint. Raises what `train` raises before the first step.

        The run is leased to this process from here to the end of `train`.
        """
        config = resolve_start(config)
        self.run = run_store(config.output_dir, config.checkpoint.staging_dir)
        self.folder = self.run.folder
        self.world = world
        self._flops: TrainingFlops | None = None
        self._step_flops: list[int] = []  # a sample, of the steps since the last log line
        self.launch = RunLaunch(self.run, world)
        with self.launch.interruptible():
            self.launch.hold_run()
            self._newest_step = self._find_checkpoint()
            self.config = config = self.folder.resolve(config)
            self._open_data()
            samples = len(self.samples)
            self.evaluators = [(e.every(samples, config.global_batch_size, self.steps), e) for e in evaluators]
            model = self._build_model()
            self._start_engine(model)
            self._resume()

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete global batches in the data set, at least 1."""
        return max(1, len(self.samples) // self.config.global_batch_size)

    def train(self) -> TrainSummary:
        """Run the remaining steps, write the weights and return the summary."""
        config = self.config
        with self.launch.held, self.launch.interruptible():
            log = self._open_log()
            profile = StepProfile(config.log.profile if self.world.first else None, self.folder.profile)
            self._saved_at = time.monotonic()
            self.launch.stop.begin_first_step()
            with closing(self._batches()) as batches:
                for step in range(self.start, self.steps):
                    done = step + 1
                    last = done == self.steps
                    log_due = last or done % config.log.every_steps == 0
                    profile.before(done)
                    with self.timer.phase("data"):
                        batch = next(batches)
                    self._check_batch(batch)

                    # Forward, loss over the global batch, backward; then all ranks update their weights, or none does.
                    with self.timer.phase("step"):
                        rate = self._set_learning_rate(step)
                        restore_moments = remember_running_moments(self.engine.module) if self._may_skip else None
                        with self._explained(step, batch):
                            result = self.grad_cache(
                                batch.inputs, step, self._groups(batch), batch.present, batch.owner_m
                            )
                        report = self.agreed_step(result, self._requests(), metrics=log_due)
                        stop, by_keyboard, overdue, lost = report.flags
                        if step == self.start:
                            self.launch.stop.first_step_done()
                            log_graph_breaks(config.engine.compile)
                        if lost:
                            raise RunInUse(taken_over(str(self.folder)))
                        self._count_update(done, report)
                        if report.nonfinite and restore_moments is not None:
                            restore_moments()
                    self._count_flops(batch)
                    self.timer.count_step(config.global_batch_size)
                    profile.after(done, last)

                    if log is not None and log_due:
                        self._log_step(log, done, report, rate)
                        self.run.publish_progress()
                    self._evaluate(log, done)
                    if last or stop or overdue or done % (config.checkpoint.every_steps or self.steps) == 0:
                        self._save_checkpoint(done, log)
                    if stop and not last:
                        if log is not None:
                            log.close()
                        self.launch.on_first_rank(self.run.publish)
                        raise self.launch.interruption(done, self.steps, by_keyboard)
            if log is not None:
                log.close()
            return self._finish()

    def _open_log(self) -> MetricsLog | None:
        """Return the log of metrics on the first rank, None on others. Raises ConfigError on all of them alike."""
        found: list[MetricsLog] = []

        def begin() -> None:
            log = MetricsLog(self.folder, self.config, self.start)
            self.launch.held.callback(log.close)
            found.append(log)
            self.run.publish()  # by what trackers know the run

        self.launch.on_first_rank(begin)
        return found[0] if found else None

    def _publish(self, log: MetricsLog | None) -> None:
        """Bring the run's files, without weights and checkpoints, to where it is kept. Collective."""

        def publish() -> None:
            if log is not None:
                log.flush()
            self.run.publish()

        self.launch.on_first_rank(publish)

    def _open_data(self) -> None:
        """Open the samples, caches and tokenizer, check them against the run's folder, and fix the number of steps."""
        config = self.config
        self._config_changes = self.folder.check(config)
        self.samples = open_samples(config, self.folder.path)
        self.worker_plan = plan_workers(config, self.samples, self.world)
        if self.worker_plan.workers:
            worker_context()  # a server of workers imports what they need while the model is built
        self.survey = survey_annotations(config, self.samples)
        self.manifests = {name: join.cache.manifest for name, join in self.samples.caches.items()}
        self.folder.check_manifests(self.manifests)
        self.tokenizer = load_named_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
        if self.tokenizer is not None:
            self.folder.check_tokenizer(self.tokenizer)
            check_tokenizer(config, self.tokenizer)
        self.end_id = self.tokenizer.special.end if self.tokenizer else END
        self.vocab_size = self.tokenizer.embedding_rows(config.data.vocab_size) if self.tokenizer else None
        # Each data set visits a sample once in an epoch, and epochs are of whole batches.
        components = self.samples.components
        self._has_groups = len(components) > 1 or components[0].group_field is not None
        self.steps = config.duration.in_steps(len(self.samples), config.global_batch_size)
        self.schedule = Schedule.of(config.optim, self.steps, len(self.samples), config.global_batch_size)
        self.folder.check_schedule(config, len(self.samples), self._newest_step)
        self._finished = self.folder.finished_steps() == self.steps

    def _build_model(self) -> TowerModel:
        """Return the model with its initial weights, the same on every rank."""
        torch.manual_seed(self.config.seed)
        model = self._new_model()
        self._init_notes = [
            *model.load_initial_weights(self.tokenizer),
            *other_vocabularies(self.config, self.tokenizer),
        ]
        self._standardize(model)
        freeze(model, self.config.optim)
        if self.config.engine.activation_checkpointing:
            model.checkpoint_activations()
        compile_model(model, self.config.engine.compile)
        return model

    def _standardize(self, model: TowerModel) -> None:
        """Give the cached towers the statistics of their caches, as the first rank computes them. Collective.

        On another machine the eigenvectors of PHI-S may come out differently, as they are no smooth function.
        """
        statistics: list[dict[str, list[Tensor]]] = [{}]

        def compute() -> None:
            for name in self.manifests:
                tower = self.config.towers[name]
                if isinstance(tower, CacheTower) and tower.standardize != "none":
                    statistics[0][name] = [torch.from_numpy(array) for array in self._statistics(name, tower)]

        self.launch.on_first_rank(compute)
        distributed.broadcast_object_list(statistics)
        for name, tensors in statistics[0].items():
            model.towers[name].set_statistics(*tensors)  # type: ignore[operator]

    def _statistics(self, name: str, tower: CacheTower) -> Sequence[FloatArray]:
        """Return what a cached tower is standardised by: mean and standard deviations, and the rotation of PHI-S."""
        if tower.standardize == "moments":
            return self.samples.moments(name)
        mean_w, covariance_ww = self.samples.covariance(name)
        rotation_ww, std = phi_s(covariance_ww)
        return mean_w, np.full(len(mean_w), std), rotation_ww

    def _new_model(self) -> TowerModel:
        widths = {name: manifest.dim for name, manifest in self.manifests.items()}
        return TowerModel(self.config, self.vocab_size, widths, self.end_id)

    def _start_engine(self, model: TowerModel) -> None:
        """Create the run's folder and hand the model, with the newest checkpoint's weights, to DeepSpeed."""
        config = self.config
        engine_config = deepspeed_config(config, self.world.size)

        def create_folder() -> None:
            self._log_summary()
            self.folder.create(config, engine_config, self.manifests, self.tokenizer)
            self.run.checkpoints.remove_partial()
            if not self._finished:
                self.run.remove_results()
            self.run.publish()

        self.launch.on_first_rank(create_folder)

        # Weights go into the model before the engine cuts it into the ranks' shares.
        self._checkpoint = self._open_checkpoint()
        if self._checkpoint is not None:
            self._checkpoint.load_model(model)
        self.engine = start_engine(model, config, engine_config)
        self.grad_cache = GradCache(
            self.engine,
            partial(total_loss, config),
            num_micro_batches(config, self.world.size),
            seed=config.seed,
            rank=self.world.rank,
            device=self.world.device,
        )
        self.agreed_step = AgreedStep(self.engine, config.optim.grad_clip_norm, self.world.device)

    def _find_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint, the same on every rank; None where there is none. Collective."""
        newest: list[int | None] = [None]

        def find() -> None:
            newest[0] = self.run.checkpoints.newest()

        self.launch.on_first_rank(find)
        distributed.broadcast_object_list(newest)
        return newest[0]

    def _open_checkpoint(self) -> CheckpointReader | None:
        """Return the newest checkpoint, where there is one. Collective."""
        checkpoints, step = self.run.checkpoints, self._newest_step
        if step is None:
            return None
        self.launch.on_each_machine(lambda: checkpoints.fetch(step))
        return CheckpointReader(checkpoints.local_folder(step), checkpoints.address(step))

    def _log_summary(self) -> None:
        """Log what will be trained, on what, for how long and at which cost; the first rank alone."""
        samples = self.samples
        stats = DatasetStats(
            usable=len(samples),
            total=samples.total,
            tars=len(samples.tars),
            left_out=samples.left_out,
            without_row=samples.without_row,
            notes=[*samples.notes(), *self._caption_notes(), self.worker_plan.line(), *self.survey],
        )
        lines, self._flops = summary_or_reason(
            self.config, self.world, self.vocab_size, self.manifests, stats, self.steps
        )
        for line in [*lines, *self._init_notes]:
            logger.info("%s", line)
        for change in self._config_changes:
            logger.info("changed since this run began: %s", change)

    def _caption_notes(self) -> list[str]:
        """Return what the start-up page says of how captions become tokens."""
        if self.tokenizer is None:
            return []
        length = self.config.data.context_length
        padded = (
            f"to {length}" if self.config.caption_padding == "context_length" else f"to the longest, {length} at most"
        )
        return [f"tokenizer: {self.tokenizer}", f"captions: padded {padded} tokens"]

    def _resume(self) -> None:
        """Take optimizer state and progress from the newest checkpoint, or start from step 0."""
        progress = Progress(0, 0)
        if self._checkpoint is not None:
            self._checkpoint.load_optimizer(self.engine)
            progress = self._checkpoint.progress
            self._checkpoint = None  # closes its files
        self.launch.on_each_machine(self.run.checkpoints.forget)
        self.start = self.steps if self._finished else progress.step
        self.updates = progress.updates
        self.counts: Counter[str] = Counter(progress.counts)
        self.timer = Timer(progress.timer)
        self._nonfinite_in_a_row = 0

    def _batches(self) -> Generator[Batch, None, None]:
        """Yield the loader's batches. Its workers end when this is closed; they ignore SIGTERM."""
        world = self.world
        loader = training_loader(
            self.config, self.samples, self.tokenizer, world.rank, world.size, self.start, self.steps, self.worker_plan
        )
        # Whole batches, also of micro-batches: their inputs are used twice, and are less than one's activations.
        yield from prefetch_to_device(loader, world.device)

    def _groups(self, batch: Batch) -> Tensor | None:
        """Return the groups of a batch's samples, where any two of them can be of one."""
        return batch.groups_b if self._has_groups else None

    def _check_batch(self, batch: Batch) -> None:
        """Count and log the bad samples of a batch. Raises BadSample where the config does not allow them."""
        self.counts.update(f"notes/{note}" for note in batch.notes)
        if not batch.bad:
            return
        if self.config.data.on_bad == "error":
            raise BadSample(f"{batch.bad[0]}; set data.on_bad: skip to train without such samples")
        for reason in batch.bad:
            logger.warning("skipped: %s", reason)
        if not len(batch):
            raise BadSample(
                f"none of the {len(batch.bad)} samples of a batch could be read; the first: {batch.bad[0]}; "
                "check the files under data.tars"
            )
        self.counts["skipped_samples"] += len(batch.bad)
        self.counts.update(f"skipped/{reason}" for reason in batch.reasons)

    @contextmanager
    def _explained(self, step: int, batch: Batch) -> Iterator[None]:
        """Raise ConfigError, for torch's own error, where a rank has too few usable samples for batch normalization."""
        try:
            yield
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise ConfigError(
                f"step {step + 1}: a rank has {len(batch)} usable samples of its batch, too few for batch "
                f"normalization ({len(batch.bad)} were left out); raise global_batch_size (now "
                f"{self.config.global_batch_size} on {self.world.size} ranks) or engine.micro_batch_size"
            ) from error

    def _set_learning_rate(self, step: int) -> float:
        """Set and return the learning rate of step `step`, counted from 0."""
        rate = self.schedule.rate(step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"]
        return rate

    @property
    def _may_skip(self) -> bool:
        return self.config.engine.on_nonfinite == "skip"

    def _count_update(self, done: int, report: StepReport) -> None:
        """Count step `done`, from 1, as an update of the weights, or as one that was skipped by all ranks.

        Raises:
            FloatingPointError: A loss or gradient was nonfinite and the config does not allow to skip the step.
        """
        if not report.nonfinite:
            self.updates += 1
            self._nonfinite_in_a_row = 0
            return
        self._nonfinite_in_a_row += 1
        self.counts["nonfinite_steps"] += 1
        limit = self.config.engine.nonfinite_limit
        names = ", ".join(report.nonfinite[:5]) + (", ..." if len(report.nonfinite) > 5 else "")
        if not self._may_skip or self._nonfinite_in_a_row >= limit:
            raise FloatingPointError(
                f"step {done}: nonfinite {names} ({self._nonfinite_in_a_row} such steps in a row); the weights are "
                f"those after {self.updates} updates. Lower optim.lr or loss.scale_max, set optim.grad_clip_norm, or "
                f"skip such steps: engine.on_nonfinite: skip, and engine.nonfinite_limit: more than {limit} in a row"
            )
        logger.warning(
            "step %d: nonfinite %s; skipped (%d in a row, engine.nonfinite_limit is %d)",
            done,
            names,
            self._nonfinite_in_a_row,
            limit,
        )

    def _requests(self) -> list[bool]:
        """Return what this rank wants all to follow: to stop, by the keyboard, to save, to give the run up."""
        stop = self.launch.stop
        return [stop.received, stop.by_keyboard, self._checkpoint_overdue(), self.launch.lease_lost()]

    def _checkpoint_overdue(self) -> bool:
        """Whether the first rank's clock asks for a checkpoint."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and self.world.first and time.monotonic() - self._saved_at >= 60 * minutes

    def _count_flops(self, batch: Batch) -> None:
        """Count the FLOPs a sample of a step, of towers and heads; on the first rank, whose batch stands for all."""
        if not self.world.first or self._flops is None:
            return
        lengths = [batch.inputs[name].shape[1] for name in self.config.towers_reading("tokens") if name in batch.inputs]
        flops = self._flops.of(max(lengths, default=self.config.data.context_length))
        if flops is not None:
            self._step_flops.append(flops)

    def _log_step(self, log: MetricsLog, done: int, report: StepReport, rate: float) -> None:
        """Write the metrics of step `done`, counted from 1."""
        interval = self.timer.interval()
        flops = sum(self._step_flops) / len(self._step_flops) if self._step_flops else None
        self._step_flops.clear()
        metrics: Metrics = {
            "step": done,
            "epoch": done / self.steps_per_epoch,
            "samples": done * self.config.global_batch_size,
            "loss": report.loss,
            "lr": rate,
            "grad_norm": report.grad_norm,
            "images_per_s": interval.images_per_s,
            "tflops_per_s": None if flops is None else interval.images_per_s * flops / 1e12,  # on all ranks
            "data_wait": interval.data_wait,
            "seconds": self.timer.training,
            "memory_gb": peak_memory(self.world.device),
            "skipped_samples": self.counts["skipped_samples"],
            "nonfinite_steps": self.counts["nonfinite_steps"],
            **{name: count for name, count in self.counts.items() if name.startswith(("notes/", "skipped/"))},
        }
        if (left := self.timer.time_left(done, self.steps)) is not None:
            metrics["seconds_left"] = left
        metrics |= report.metrics
        metrics |= self.samples.mixture_metrics(done)
        log.write(metrics)
        logger.info("%s", step_line(metrics, self.steps))

    def _evaluate(self, log: MetricsLog | None, done: int) -> None:
        """Call the evaluators that are due after step `done`."""
        due = [evaluator for every, evaluator in self.evaluators if done % every == 0 or done == self.steps]
        if not due:
            return
        with self.timer.phase("evaluation"), self._gathered_model() as model:
            for evaluator in due:
                metrics = evaluator(model, done)
                if log is None:
                    continue
                log.write({"step": done} | {f"{evaluator.name}/{key}": value for key, value in metrics.items()})
                values = ", ".join(f"{key} {value:.3f}" for key, value in metrics.items())
                logger.info("step %d/%d | %s: %s", done, self.steps, evaluator.name, values)

    @contextmanager
    def _gathered_model(self) -> Iterator[TowerModel]:
        """Give the model in evaluation mode with complete parameters: under ZeRO 3, which partitions them, a copy."""
        import deepspeed

        module: TowerModel = self.engine.module
        model = module
        with running_moments_kept(module):
            # Ranks embed parts of one set, so all use the moments that would be saved now.
            average_running_moments(module)
            if self.config.engine.zero_stage == 3:
                model = self._new_model().to(self.world.device)
                with deepspeed.zero.GatheredParameters(list(module.parameters())):
                    model.load_state_dict(module.state_dict())
            model.eval()
            try:
                with torch.no_grad():
                    yield model
            finally:
                module.train()

    def _save_checkpoint(self, done: int, log: MetricsLog | None) -> None:
        """Write a checkpoint after step `done`."""
        with self.timer.phase("checkpoint"):
            self._publish(log)
            progress = Progress(done, self.updates, dict(self.counts), self.timer.state())
            save_checkpoint(self.engine, self.run.checkpoints, progress, self.config.checkpoint.keep, self.world)
        self._saved_at = time.monotonic()

    def _finish(self) -> TrainSummary:
        """Write the weights and the summary, and return the latter."""
        if self._finished:  # before this launch
            return TrainSummary(**json.loads(self.folder.summary.read_text()))
        save_weights(self.engine, self.folder.weights, self.world)
        summary = TrainSummary.of(
            self.steps,
            len(self.samples),
            self.steps / self.steps_per_epoch,
            self.timer,
            self.counts,
            self.world.device,
        )
        if self.world.first:
            write_atomic(self.folder.summary, json.dumps(asdict(summary), indent=2))
            for note, count in summary.notes.items():
                logger.info("noted: %s, in %d samples on this rank", note, count)
            for reason, count in summary.skipped_by_reason.items():
                logger.info("skipped: %s, %d samples on this rank", reason, count)
            logger.info("%s", summary.bottleneck)
        self.launch.on_first_rank(self.run.publish)
        return summary
