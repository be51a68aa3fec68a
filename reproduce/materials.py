"""What all experiments share: tars filtered by style, a tokenizer, descriptions of the evaluation sets."""

import json
from pathlib import Path

import yaml

from reproduce.folder import Folder, read_json, write_json
from reproduce.plan import BadPlan, Plan
from threetowers.cache.storage.atomic import finish_partial, write_atomic
from threetowers.cache.webdataset.sample import read_annotation
from threetowers.cache.webdataset.tar_index import expand, index_tar, read_member
from threetowers.trainer.tokenizer import train_tokenizer

SPLITS = "data/splits.json"


def prepare(plan: Plan, folder: Folder, configs: Path) -> None:
    """Make the materials, those that are not there. Raises BadPlan where other styles were split here before."""
    styles = {"train": plan.styles.contrastive, "teacher": plan.styles.teacher}
    if not folder[SPLITS].exists():
        counts = {name: filtered(plan.emoji, chosen, folder[f"data/{name}.tar"]) for name, chosen in styles.items()}
        write_json(folder[SPLITS], {"styles": styles, "samples": counts})
    elif (found := read_json(folder[SPLITS])["styles"]) != styles:
        raise BadPlan(f"{folder[SPLITS]}: split by {found}, the plan asks for {styles}; choose another --out")
    tokenizer = folder["data/tokenizer.model"]
    if not tokenizer.exists():
        tar = index_tar(folder["data/train.tar"])
        captions = dict.fromkeys(c for n in range(len(tar.samples)) for c in read_annotation(tar, n).captions)
        write_atomic(tokenizer, train_tokenizer(list(captions), plan.vocabulary))
    folder["sets"].mkdir(exist_ok=True)
    for source in sorted((configs / "sets").glob("*.yaml")):
        named = {name: json.dumps(getattr(plan.styles, name)) for name in ("contrastive", "teacher", "shift")}
        text = folder.filled(source.read_text(), emoji=plan.emoji, **named)
        write_atomic(folder["sets"] / source.name, _absolute(text))


def filtered(emoji: str, styles: list[str], out: Path) -> int:
    """Write the training samples of some art styles into one tar, byte for byte, and return how many they are."""
    import webdataset

    out.parent.mkdir(parents=True, exist_ok=True)
    count, partial = 0, out.with_suffix(".partial")
    with webdataset.TarWriter(str(partial), encoder=False, mtime=0) as writer:
        for tar in map(index_tar, expand([f"{emoji}/train-*.tar"])):
            for ordinal, sample in enumerate(tar.samples):
                if read_annotation(tar, ordinal).fields.get("style") in styles:
                    members = {extension: read_member(tar, ordinal, extension) for extension in sample.members}
                    writer.write({"__key__": sample.key, **members})
                    count += 1
    if not count:
        raise BadPlan(f"{emoji}: no training sample is of the styles {styles}")
    finish_partial(partial, out)
    return count


def _absolute(text: str) -> str:
    """A description whose relative tars are the repository's: it lies elsewhere than they are looked for."""
    tree = yaml.safe_load(text)
    for part in (tree, tree.get("train") or {}):
        if "tars" in part:
            part["tars"] = [str(Path(tar).absolute()) for tar in part["tars"]]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
