"""One learning rate a method, chosen on the validation concepts."""

from typing import Any

from reproduce.experiment import VALIDATION, validation_score
from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import Plan
from threetowers.eval.record import read_record


def choose_rates(plan: Plan, folder: Folder) -> dict[str, float]:
    """Return the best rate of each method, by the trials in the folder; without trials none: the configs' own hold."""
    tried: dict[str, dict[str, Any]] = {}
    for one in plan.trials():
        name = read_json(folder.finished(one.name))["records"]["0"][VALIDATION]
        score = validation_score(read_record(folder["records"] / name))
        tried.setdefault(one.method, {})[f"{one.rate:g}"] = score
    chosen = {method: float(max(scores, key=scores.__getitem__)) for method, scores in tried.items()}
    write_json(folder["rates.json"], {"chosen": chosen, "tried": tried})
    return chosen
