"""The configs of runs in configs/, and their variants."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUNS = sorted([*ROOT.glob("configs/emoji/*.yaml"), *ROOT.glob("configs/papers/*.yaml")])
REPRODUCED = [ROOT / "configs" / "reproduce" / file.name for file in sorted(ROOT.glob("configs/emoji/*.yaml"))]
REPRODUCED = [file for file in REPRODUCED if file.exists()]  # of the method that the emoji config of this name has


def variants(file: Path) -> list[str | None]:
    """Return the names of a config's variants, after None for the config as it stands."""
    return [None, *yaml.safe_load(file.read_text()).get("variants", {})]
