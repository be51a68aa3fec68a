"""The configs of runs in configs/, and their variants."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUNS = sorted([*ROOT.glob("configs/emoji/*.yaml"), *ROOT.glob("configs/papers/*.yaml")])


def variants(file: Path) -> list[str | None]:
    """Return the names of a config's variants, after None for the config as it stands."""
    return [None, *yaml.safe_load(file.read_text())["variants"]]
