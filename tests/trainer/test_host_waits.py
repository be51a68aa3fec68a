"""A step waits for the device once, whatever it is made of: where all ranks agree on it."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.host_waits import host_waits
from tests.trainer.launches import run_command, torchrun, write_config

WAITING_RUNS = str(Path(__file__).with_name("waiting_runs.py"))
THE_WAIT = "agreed_step.py"


def test_a_wait_of_each_kind_is_found() -> None:
    x = torch.arange(6.0)
    with host_waits() as found:
        float(x[0])
        bool(x.sum() > 0)
        x.tolist()
        x.cpu()
        x.nonzero()
        x[x > 2]
        x.unique()
        torch.tensor([1.0], device=x.device)
        x.new_tensor([1.0])
        torch.tensor([1.0])  # none, as all below
        x.sum().add_(x[1:3].mean()).exp()
        x.masked_fill_(x > 2, 0.0)
        x.index_select(0, torch.arange(2))
    assert len(found) == 9, found
    assert all("trainer/test_host_waits.py" in wait for wait in found)


@pytest.mark.distributed
def test_one_host_wait_a_step(three: dict[str, Any], tmp_path: Path) -> None:
    """With clipping, skipping, groups, log lines, several captions and samples that lack a tower.

    DeepSpeed's own waits count as well.
    """
    three["towers"]["third"]["on_missing_row"] = "mask"
    three |= {"optim": {"grad_clip_norm": 0.1}}
    sigmoid = three | {"loss": {"kind": "sigmoid"}, "optim": {}}
    teacher = {"x": "t", "y": "t", "temperature": 0.1}
    taught = {
        "x": "f",
        "y": "g",
        "kind": "distill",
        "teachers": {"a": teacher, "b": teacher | {"temperature": "scale"}},
    }
    angle = {"x": "f_h", "y": "h_f", "kind": "cosine"}
    distilled = three | {
        "heads": three["heads"] | {"t": {"of": "third", "kind": "none"}},
        "terms": three["terms"] | {"taught": taught | {"drop_teachers": 0.5}, "angle": angle},
    }
    captioned = three | {"data": three["data"] | {"captions_per_sample": 2}}
    layouts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": (three, {"zero_stage": 0}),
        "again": (sigmoid, {"zero_stage": 1, "micro_batch_size": 3, "activation_checkpointing": True}),
        "sharded": (distilled, {"zero_stage": 2, "on_nonfinite": "skip"}),
        "mixed": (captioned, {"zero_stage": 1, "precision": "mixed"}),
        "half": (distilled, {"zero_stage": 2, "precision": "bfloat16", "micro_batch_size": 3}),
    }
    files = [write_config(tree, tmp_path, name, **engine)[0] for name, (tree, engine) in layouts.items()]
    output = run_command([*torchrun(2), WAITING_RUNS, *files]).stdout
    alone = write_config(sigmoid, tmp_path, "alone", zero_stage=1, precision="bfloat16")[0]
    output += run_command([sys.executable, WAITING_RUNS, alone]).stdout
    runs = [json.loads(line) for line in output.splitlines() if line.startswith('{"config"')]
    assert len(runs) == 2 * len(layouts) + 1
    wrong = []
    for run in runs:
        assert len(run["steps"]) == 3
        for waits in run["steps"]:
            if len(waits) != 1 or THE_WAIT not in waits[0]:
                wrong += [f"{Path(run['config']).stem}: {n} x {wait}" for wait, n in Counter(waits).items()]
    assert not wrong, "\n".join(sorted(set(wrong)))
