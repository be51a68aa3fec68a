"""The command line: what it offers, and that bad input is one line and an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from threetowers.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["threetowers", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return 0 if stop.value.code is None else int(str(stop.value.code))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["cache", "tokenizer", "train", "eval"]),
        (["cache"], ["build", "info", "verify"]),
        (["cache", "build"], ["--encoder", "--of", "--feature", "brace ranges"]),
        (["tokenizer", "train"], ["--vocab-size"]),
        (["train"], ["key.path=value", "torchrun"]),
        (["eval", "retrieval"], ["--group-field", "--live-teacher", "FAISS"]),
    ],
)
def test_help(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments, "--help") == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cache", "info", "nowhere"], "ManifestError: nowhere: no cache here"),
        (
            ["cache", "build", "--tars", "no-*.tar", "--output-dir", "x", "--encoder", "timm:b"],
            "'no-*.tar' matches no file",
        ),
        (["tokenizer", "train", "--tars", "no.tar", "--output", "x"], "'no.tar' matches no file"),
        (["train", "no.yaml"], "ConfigError: no.yaml: cannot be read as YAML"),
        (["eval", "retrieval", "no-run", "--tars", "no.tar", "--output-dir", "x"], "'no.tar' matches no file"),
        (["eval", "retrieval", "r", "--tars", "t", "--output-dir", "x", "--cache", "third"], "expected TOWER=PATH"),
        (
            ["eval", "retrieval", "r", "--tars", "t", "--cache", "a=x", "--cache", "a=y"],
            "--cache is given twice, expected",
        ),
        (["cache", "build", "--tars=a", "--encoder", "e", "--tars=b", "--tars", "c"], "--tars is given 3 times"),
        (["eval", "retrieval", "r", "--output-dir", "x", "--output_dir", "y"], "--output-dir is given twice"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("threetowers: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_from_tars(
    tars: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "t.model"
    arguments = ["tokenizer", "train", "--tars", *map(str, tars), "--vocab-size", "48", "--output", str(out)]
    assert run(monkeypatch, *arguments) == 0
    assert out.exists()
    assert "captions: 40 distinct of 90, in 45 samples of 2 tars" in capsys.readouterr().out


def test_an_output_that_cannot_be_is_one_line(
    tars: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "t.model"
    assert run(monkeypatch, "tokenizer", "train", "--tars", *map(str, tars), "--output", str(out)) == 2
    error = capsys.readouterr().err.strip()
    assert str(tmp_path / "file") in error
    assert error.endswith("choose another path for it, or make room")
    assert len(error.splitlines()) == 1


def test_a_closed_pipe_is_no_error(cache: Path) -> None:
    command = f"{sys.executable} -m threetowers cache info {cache} | head -n 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=120)
    assert "test_resnet" in result.stdout
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
