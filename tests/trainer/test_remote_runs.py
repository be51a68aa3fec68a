"""Runs that are kept in an object store: resumed on a fresh machine, killed between any two requests, leased."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from tests.trainer.finished_runs import finished_run
from tests.trainer.launches import ENVIRONMENT, TRAIN, metric, run_command, same_weights, torchrun
from threetowers.cache.encoders.names import EncoderName, EncoderOptions, load_frozen_encoder
from threetowers.cache.processes.preemption import PREEMPTED_EXIT_CODE, Interrupted
from threetowers.cache.storage.lease import LeaseOwner
from threetowers.cache.storage.remote import RemoteStorage
from threetowers.cache.storage.storage import StorageError, WriteError
from threetowers.eval.encoders.load import load_encoder
from threetowers.trainer.config import ConfigError, parse
from threetowers.trainer.engine import join_process_group
from threetowers.trainer.export.export import export
from threetowers.trainer.export.trained_model import load_model
from threetowers.trainer.model.initial.initial_weights import load_initial
from threetowers.trainer.monitoring.train_summary import TrainSummary
from threetowers.trainer.run import run_lease, run_store
from threetowers.trainer.run.finished_run import finished_run_folder
from threetowers.trainer.run.run_lease import RunInUse
from threetowers.trainer.train import Trainer, train


class Killed(BaseException):
    """The process ended here."""


@pytest.fixture
def remote(clip: dict[str, Any], tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A run in memory, three steps with a checkpoint after each, whose machine has a staging folder."""
    url = f"memory://{tmp_path.name}/run"
    yield clip | {
        "output_dir": url,
        "duration": {"steps": 3},
        "checkpoint": {"every_steps": 1, "keep": 1, "staging_dir": str(tmp_path / "staging")},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    RemoteStorage(url)._root[0].rm(tmp_path.name, recursive=True)


@pytest.fixture
def finished(clip: dict[str, Any], tmp_path: Path) -> Path:
    """The same run in a local folder, never interrupted."""
    out = tmp_path / "local"
    tree = {"output_dir": str(out), "duration": {"steps": 3}, "log": {"every_steps": 1, "tensorboard": False}}
    train(parse(clip | tree))
    return out


def download(tree: dict[str, Any], out: Path) -> Path:
    """Copy a run out of the store."""
    storage = RemoteStorage(tree["output_dir"])
    shutil.rmtree(out, ignore_errors=True)
    for name in storage.walk():
        storage.download(name, out / name)
    return out


def staged(tmp_path: Path) -> list[Path]:
    """What is left in the staging folder."""
    return list((tmp_path / "staging").glob("*"))


def test_a_remote_run_is_a_local_one_elsewhere(remote: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    summary = train(parse(remote))
    out = download(remote, tmp_path / "copy")
    assert same_weights(out, finished)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    local = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert names == local
    assert "checkpoints/step-00000003/checkpoint.json" in names
    assert staged(tmp_path) == []
    again = train(parse(remote))  # finished: nothing is trained
    assert again == summary
    assert staged(tmp_path) == []
    longer = remote | {"duration": {"steps": 4}}
    with pytest.raises(ConfigError, match=f"^{remote['output_dir']} holds a run with another schedule"):
        train(parse(longer))


def requests(monkeypatch: pytest.MonkeyPatch, before: Callable[[str, str], None]) -> None:
    """Call `before(method, name)` before each request that changes the store."""
    for method in ("put", "upload", "delete", "create_exclusive"):
        real = getattr(RemoteStorage, method)

        def call(
            self: RemoteStorage, name: str, *args: Any, method: str = method, real: Any = real, **kwargs: Any
        ) -> Any:
            before(method, name)
            return real(self, name, *args, **kwargs)

        monkeypatch.setattr(RemoteStorage, method, call)


def test_a_run_goes_on_wherever_it_is_killed(
    remote: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each launch is killed some requests after it took the lease; the last one ends. No half checkpoint is resumed.

    A killed one leaves its staging folder and its lease.
    """
    monkeypatch.setattr(run_lease, "SETTLE_SECONDS", 0.0)
    left = [0]

    def kill(method: str, name: str) -> None:
        left[0] -= ".lease" not in name
        if left[0] < 0:
            raise Killed

    requests(monkeypatch, kill)
    forget = run_store.RemoteRun.forget
    monkeypatch.setattr(run_store.RemoteRun, "forget", lambda run: forget(run) if left[0] >= 0 else None)
    starts, launches = [], 0
    summary: TrainSummary | None = None
    while summary is None:
        left[0] = 3 + 2 * launches  # requests that this launch may make
        launches += 1
        assert launches < 40
        try:
            trainer = Trainer(parse(remote), join_process_group())
            starts.append(trainer.start)
            summary = trainer.train()
        except Killed:
            continue
    assert starts == sorted(starts)
    assert len(set(starts)) > 2
    out = download(remote, tmp_path / "copy")
    assert same_weights(out, finished)
    assert metric(out, "step") == [1, 2, 3]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    assert len(list((out / "checkpoints/step-00000003").iterdir())) == 2
    assert staged(tmp_path) == []


def test_sigterm_leaves_a_checkpoint_that_a_fresh_machine_resumes(
    remote: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it arrives while a checkpoint is uploaded."""

    def stop(method: str, name: str) -> None:
        if method == "upload" and "step-00000001" in name:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        requests(patch, stop)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after step 2 of 3") as stopped:
            train(parse(remote))
    assert stopped.value.exit_code == PREEMPTED_EXIT_CODE
    assert staged(tmp_path) == []
    fresh = remote | {"checkpoint": remote["checkpoint"] | {"staging_dir": str(tmp_path / "another machine")}}
    trainer = Trainer(parse(fresh), join_process_group())
    assert trainer.start == 2
    trainer.train()
    out = download(remote, tmp_path / "copy")
    assert same_weights(out, finished)
    assert metric(out, "step") == [1, 2, 3]


def test_a_second_launch_is_refused_and_changes_nothing(
    remote: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lease, "POLL_SECONDS", 0.02)
    storage = RemoteStorage(remote["output_dir"])
    with run_lease.remote_run_lease(storage) as lease:
        monkeypatch.setattr(LeaseOwner, "is_dead", lambda self, other: False)
        with pytest.raises(RunInUse, match=f"^{remote['output_dir']}: process {os.getpid()} on .* has been training"):
            train(parse(remote))
        assert lease.confirm()
        assert storage.walk() == [".lease/owner.json"]
    assert storage.walk() == []


def test_a_store_that_refuses_a_checkpoint_is_one_message(
    remote: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(method: str, name: str) -> None:
        if method == "upload" and "step-00000002" in name:
            raise WriteError("cannot write: quota")

    requests(monkeypatch, refuse)
    url = remote["output_dir"]
    with pytest.raises(
        OSError, match=rf"^{url}/checkpoints/step-00000002 cannot be written: rank 0: .*quota.* step-00000001$"
    ):
        train(parse(remote))
    assert staged(tmp_path) == []
    names = RemoteStorage(url).walk()
    assert [name for name in names if "step-00000002" in name or ".lease" in name] == []


def test_metrics_are_uploaded_between_checkpoints_and_a_refusal_is_a_warning(
    remote: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_store, "PROGRESS_SECONDS", 0.0)
    uploads = 0

    def refuse_once(method: str, name: str) -> None:
        nonlocal uploads
        if name == "metrics.jsonl":
            uploads += 1
            if uploads == 2:
                raise StorageError("cannot write: busy")

    requests(monkeypatch, refuse_once)
    train(parse(remote | {"checkpoint": remote["checkpoint"] | {"every_steps": None}}))
    assert uploads == 4  # the empty file, and three steps, of which the first was refused
    assert "cannot write: busy; tried again at the next checkpoint" in caplog.text


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_and_s3(clip: dict[str, Any], bucket: str, tmp_path: Path) -> None:
    """The command line, from one layout to another."""
    url = f"{bucket}/{tmp_path.name}"
    ENVIRONMENT.update({name: value for name, value in os.environ.items() if name.startswith("AWS_")})
    tree = clip | {"output_dir": url, "duration": {"steps": 2}, "optim": {"schedule": "constant", "warmup": 0.0}}
    tree["checkpoint"] = {"staging_dir": str(tmp_path / "staging")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    run_command([*torchrun(2), "-m", "threetowers", "train", str(file)])
    assert fsspec.filesystem("s3").exists(f"{url}/model.safetensors")
    run_command([*TRAIN, str(file), "duration.steps=3"])
    out = download(tree, tmp_path / "copy")
    assert metric(out, "step") == [1, 2, 3]
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}
    assert len(list((out / "tensorboard").iterdir())) == 2
    assert staged(tmp_path) == []


def test_a_run_at_a_url_is_read_like_a_folder(clip: dict[str, Any], tmp_path: Path) -> None:
    """By `load_model`, evaluation, export, `init` and as a frozen encoder; a copy is made once."""
    folder = finished_run(clip)
    url = f"memory://{tmp_path.name}/finished/clip"
    storage = RemoteStorage(url)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/merges.txt").write_text("a b")
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload(path.relative_to(folder).as_posix(), path)
    storage.put("checkpoints/step-00000001/checkpoint.json", b"{}", "")
    captions = ["a red disc", "cross, blue"]
    here, there = load_model(folder), load_model(url)
    assert there.encode_texts(captions).equal(here.encode_texts(captions))
    assert finished_run_folder(url).path == finished_run_folder(f"{url}/").path
    copied = {
        str(path.relative_to(finished_run_folder(url).path)) for path in finished_run_folder(url).path.rglob("*.*")
    }
    assert copied == {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert load_encoder(url).info == load_encoder(folder).info
    assert load_encoder(f"run:{url}").info.name == "clip"
    export(url, tmp_path / "export")
    assert load_model(tmp_path / "export").encode_texts(captions).equal(here.encode_texts(captions))
    assert EncoderName.parse(f"run:{url}") == EncoderName("run", url)
    encoder = load_frozen_encoder(f"run:{url}", EncoderOptions("cpu"))
    assert encoder.weights_digest == load_frozen_encoder(f"run:{folder}", EncoderOptions("cpu")).weights_digest
    tower = load_model(folder).model.towers["text"]
    with torch.no_grad():
        for p in tower.parameters():
            p.zero_()
    config = parse(clip | {"towers": clip["towers"] | {"text": clip["towers"]["text"] | {"init": f"run:{url}"}}})
    load_initial(tower, config.towers["text"], "towers.text.init")
    assert all(p.equal(q) for p, q in zip(tower.parameters(), here.model.towers["text"].parameters(), strict=True))
    with pytest.raises(ValueError, match=f"^{url}-none holds no finished run: config.yaml is missing"):
        load_model(f"{url}-none")
    storage._root[0].rm(tmp_path.name, recursive=True)
