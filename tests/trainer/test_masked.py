"""Samples without a third tower: each term is the loss over the samples that have both its towers, on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.trainer.test_config import THREE
from threetowers.kernels import reference_contrastive_loss
from threetowers.trainer.config import TrainConfig, parse
from threetowers.trainer.loss import TermResult, total_loss
from threetowers.trainer.model.model import Outputs

WIDTH = 6
SIDES = {"f": "image", "g": "text", "f_h": "image", "h_f": "third", "g_h": "text", "h_o": "other"}
# which of 11 samples have each third tower; rank 0 holds the first 7
PRESENT = {
    "all": ([1] * 11, [1] * 11),
    "some": ([1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1, 1, 1, 1, 0, 1]),
    "none on rank 1": ([1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0], [0] * 7 + [1] * 4),
    "none at all": ([0] * 11, [1] * 11),
}


def config_of(kind: str) -> TrainConfig:
    """Two third towers, each in a term of its own and together in one."""
    cached = {"kind": "cache", "path": "c", "on_missing_row": "mask"}
    terms = {
        "image-text": {"x": "f", "y": "g", "weight": 0.5},
        "image-third": {"x": "f_h", "y": "h_f", "weight": 2.0},
        "text-other": {"x": "g_h", "y": "h_o", "scale": "another"},
        "third-other": {"x": "h_f", "y": "h_o"},
        "text-third": {"x": "g_h", "y": "h_f", "kind": "l2"},
    }
    heads = {name: {"of": tower} for name, tower in SIDES.items()}
    towers = THREE["towers"] | {"third": cached, "other": cached}
    return parse(THREE | {"towers": towers, "heads": heads, "terms": terms, "loss": {"kind": kind}})


def leaves() -> dict[str, Tensor]:
    """A linear map for each head, scales and biases."""
    g = torch.Generator().manual_seed(1)
    maps = {name: torch.randn(WIDTH, WIDTH, generator=g).requires_grad_() for name in SIDES}
    scales = {f"{kind} {name}": torch.tensor([0.3]) for kind in ("log", "bias") for name in ("scale", "another")}
    return maps | {name: value.requires_grad_() for name, value in scales.items()}


def features() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    towers = dict.fromkeys(SIDES.values())
    return {name: torch.nn.functional.normalize(torch.randn(11, WIDTH, generator=g), dim=1) for name in towers}


def masked_loss(
    config: TrainConfig, case: str, groups_B: Tensor | None, mine: slice, values: dict[str, Tensor]
) -> tuple[Tensor, dict[str, TermResult]]:
    rows = features()
    embeddings = {name: rows[tower][mine] @ values[name] for name, tower in SIDES.items()}
    names = ("scale", "another")
    biases = {name: values[f"bias {name}"] for name in names} if config.loss.kind == "sigmoid" else {}
    outputs = Outputs(embeddings, {name: values[f"log {name}"] for name in names}, biases)
    third, other = (torch.tensor(has, dtype=torch.bool)[mine] for has in PRESENT[case])
    for name, tower in SIDES.items():  # what a masked sample holds must not matter
        if tower in ("third", "other"):
            has = third if tower == "third" else other
            outputs.embeddings[name] = torch.where(has[:, None], outputs.embeddings[name], torch.tensor(1e4))
    ids_b = None if groups_B is None else groups_B[mine]
    return total_loss(config, outputs, ids_b, present={"third": third, "other": other})


def expected_loss(
    config: TrainConfig, case: str, groups_B: Tensor | None, values: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense loss of each term over the samples that have it, in float64."""
    rows = {name: value.double() for name, value in features().items()}
    has = dict(zip(("third", "other"), (torch.tensor(h, dtype=torch.bool) for h in PRESENT[case]), strict=True))
    terms: dict[str, Tensor] = {}
    for name, term in config.terms.items():
        keep = torch.ones(11, dtype=torch.bool)
        for tower in (SIDES[term.x], SIDES[term.y]):
            keep &= has.get(tower, keep)
        if not keep.any():
            terms[name] = torch.zeros((), dtype=torch.float64)
            continue
        x, y = (rows[SIDES[side]][keep] @ values[side].double() for side in (term.x, term.y))
        if term.kind == "l2":
            terms[name] = (x - y).square().sum(1).mean()
            continue
        bias = values[f"bias {term.scale}"].double() if config.loss.kind == "sigmoid" else None
        terms[name] = reference_contrastive_loss(
            x,
            y,
            values[f"log {term.scale}"].double(),
            bias=bias,
            kind=config.loss.kind,
            group_ids=None if groups_B is None else groups_B[keep],
        )
    return torch.stack([config.terms[name].weight * loss for name, loss in terms.items()]).sum(), terms


def check(rank: int, ranks: int) -> None:
    mine = slice(None) if ranks == 1 else (slice(0, 7), slice(7, 11))[rank]
    for kind in ("softmax", "sigmoid"):
        config = config_of(kind)
        for case in PRESENT:
            for groups_B in (None, torch.arange(11) % 4):
                values, reference = leaves(), leaves()
                total, report = masked_loss(config, case, groups_B, mine, values)
                expected, terms = expected_loss(config, case, groups_B, reference)
                torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
                for name, loss in terms.items():
                    torch.testing.assert_close(report[name].loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
                assert bool(report["image-third"].accuracy.isnan()) == (case == "none at all")
                total.backward()
                expected.backward()
                for name, leaf in values.items():
                    grad, want = leaf.grad, reference[name].grad
                    if grad is None:
                        assert want is None, (case, name)
                        continue
                    if ranks > 1:
                        dist.all_reduce(grad)
                    want = torch.zeros_like(grad) if want is None else want
                    torch.testing.assert_close(grad / ranks, want, rtol=1e-4, atol=1e-6, msg=f"{kind} {case} {name}")


def test_one_process() -> None:
    check(0, 1)


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check(rank, 2)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "store"),), nprocs=2)


def test_a_tower_that_every_term_needs_cannot_be_masked() -> None:
    tree: dict[str, Any] = THREE | {"towers": THREE["towers"] | {"third": {"kind": "cache", "path": "c"}}}
    tree["towers"]["third"]["on_missing_row"] = "mask"
    parse(tree)
    lit = tree | {"terms": {"t": {"x": "g", "y": "h_f"}}, "deploy": {"image": "h_f", "text": "g"}}
    lit["towers"] = {name: tree["towers"][name] for name in ("text", "third")}
    lit["heads"] = {name: tree["heads"][name] for name in ("g", "h_f")}
    with pytest.raises(ValueError, match=r"towers\.third\.on_missing_row: mask .* every term .*use skip"):
        parse(lit)
