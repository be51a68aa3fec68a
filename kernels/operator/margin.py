"""The margin above a positive beyond which a negative is taken for a false one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from threetowers.kernels.distributed.rank_group import RankGroup
from threetowers.kernels.operator.pair_state import PairState


def with_limits(pairs: Sequence[PairState], margin: float, ranks: RankGroup) -> list[PairState]:
    """Return the pairs with limits on dots, from which on entries are excluded. Collective: one gather.

    margin: how far a dot may lie above the smallest positive of its row, and above that of its column.
    """
    limits = [_own_limits(pair, margin) for pair in pairs]
    padded = [
        pair.column_layout.padded(col_limit_m.double()) for pair, (_, col_limit_m) in zip(pairs, limits, strict=True)
    ]
    gathered_WN = ranks.gather(torch.cat(padded))
    results = []
    parts = torch.split(gathered_WN, [len(part) for part in padded], dim=1)
    for pair, (row_limit_b, _), part_Wm in zip(pairs, limits, parts, strict=True):
        col_limit_B = pair.column_layout.join(part_Wm).to(pair.backend.dtype, copy=True)
        exclusions = replace(pair.exclusions, row_limits_b=row_limit_b, col_limits_B=col_limit_B)
        results.append(replace(pair, exclusions=exclusions))
    return results


def _own_limits(pair: PairState, margin: float) -> tuple[Tensor, Tensor]:
    """Return the limits of the own rows, (b,), and of the own columns, (m,).

    They lie above the smallest positive by the margin, and by what rounding may add; at infinity where there is none.
    """
    dot_m, slack_m = pair.positives()
    limit_m = dot_m + slack_m + margin
    return pair.owners.by_row(limit_m, "min").clone(), pair.owners.mark(limit_m, torch.inf)
