"""The README's Python, run as it stands there on a small part of the demo's data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emoji_samples import ROOT, demo_folder

# The demo's run, shortened.
SHORTER = {'"duration={epochs: 20}"': '"duration={steps: 2}", "global_batch_size=32", "data.workers=0"'}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The folder that `make demo` leaves, of 64 images to train on and 40 to test on."""
    demo_folder(tmp_path, {"train": 64, "test": 40})
    teacher = ["--encoder", "timm:tf_efficientnet_lite0@160:package:efficientnet-lite0"]
    build = ["cache", "build", "--tars", "data/emoji/*.tar", "--output-dir", "runs/emoji/cache", *teacher]
    tokenizer = ["tokenizer", "train", "--tars", "data/emoji/train-*.tar", "--output", "runs/emoji/tokenizer.model"]
    for arguments in (build, tokenizer):
        subprocess.run([sys.executable, "-m", "threetowers", *arguments], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_the_python_of_the_readme_runs(demo: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for long, short in SHORTER.items():
        assert long in code
        code = code.replace(long, short)
    code += (
        "\nprint(embeddings_ND.shape, tuple(text_ND.shape), sorted({record.spec.task for record in results.records}))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=demo, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "(40, 1280) (2, 256) ['retrieval', 'shift']"
