"""Shared inputs of all experiments: tars filtered by style, a tokenizer, configs of the evaluation sets."""

import json
from pathlib import Path

import yaml

from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import BadPlan, Plan
from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.tar_index import index_tar, read_member
from threetowers.cache.webdataset.tar_patterns import expand
from threetowers.trainer.tokenizer import train_tokenizer

SPLITS = "data/splits.json"


def prepare_materials(plan: Plan, folder: Folder, configs: Path) -> None:
    """Write the materials that are missing.

    Raises:
        BadPlan: If the folder was split by other styles before, or no sample is of the styles.
    """
    # The tars of each use of a style.
    styles = {"train": plan.styles.contrastive, "teacher": plan.styles.teacher}
    if not folder[SPLITS].exists():
        counts = {}
        for name, chosen in styles.items():
            counts[name] = write_tar_of_styles(plan.emoji, chosen, folder[f"data/{name}.tar"])
        write_json(folder[SPLITS], {"styles": styles, "samples": counts})
    elif (found := read_json(folder[SPLITS])["styles"]) != styles:
        raise BadPlan(f"{folder[SPLITS]}: split by styles {found}, expected {styles}; choose another --out")

    # The tokenizer, of the captions of the contrastive data.
    tokenizer = folder["data/tokenizer.model"]
    if not tokenizer.exists():
        tar = index_tar(folder["data/train.tar"])
        captions: dict[str, None] = {}
        for ordinal in range(len(tar.samples)):
            captions |= dict.fromkeys(read_annotation(tar, ordinal).captions)
        write_atomic(tokenizer, train_tokenizer(list(captions), plan.vocabulary))

    # The evaluation sets, with the paths and styles of this folder.
    folder["sets"].mkdir(exist_ok=True)
    names = {name: json.dumps(getattr(plan.styles, name)) for name in ("contrastive", "teacher", "shift")}
    for source in sorted((configs / "sets").glob("*.yaml")):
        text = folder.substitute(source.read_text(), emoji=plan.emoji, **names)
        write_atomic(folder["sets"] / source.name, _with_absolute_tars(text))


def write_tar_of_styles(emoji: str, styles: list[str], out: Path) -> int:
    """Write the training samples of some art styles into one tar, byte for byte, and return their number."""
    import webdataset

    out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    partial = out.with_suffix(".partial")
    with webdataset.TarWriter(str(partial), encoder=False, mtime=0) as writer:
        for tar in map(index_tar, expand([f"{emoji}/train-*.tar"])):
            for ordinal, sample in enumerate(tar.samples):
                if read_annotation(tar, ordinal).fields.get("style") in styles:
                    members = {extension: read_member(tar, ordinal, extension) for extension in sample.members}
                    writer.write({"__key__": sample.key, **members})
                    count += 1
    if not count:
        raise BadPlan(f"{emoji}: no training sample is of the styles {styles}; change `styles` of the plan")
    finish_partial(partial, out)
    return count


def _with_absolute_tars(text: str) -> str:
    """Return a config with absolute paths of its tars, which otherwise are relative to the folder of the config."""
    tree = yaml.safe_load(text)
    for part in (tree, tree.get("train") or {}):
        if "tars" in part:
            part["tars"] = [str(Path(tar).absolute()) for tar in part["tars"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
