"""What differs from the papers: said before anything else."""

from collections.abc import Iterator, Sequence

from reproduce.folder import read_json
from reproduce.plan import Plan
from reproduce.report.document import Block, Heading, Text
from reproduce.report.findings import Findings


def blocks(findings: Findings) -> Iterator[Block]:
    plan, counts = findings.plan, read_json(findings.folder["data/splits.json"])["samples"]
    yield Heading("What differs from the papers")
    yield Text(
        f"Scale, by many orders of magnitude. The papers train ViT-L/16 on billions of pairs from the web; here "
        f"the main image tower is timm's `{plan.pretraining.model}` (for MS-CLIP, a small transformer), trained "
        f"from nothing on {counts['train']:,} emoji drawings of {plan.pretraining.image_size} pixels in the styles "
        f"{_words(plan.styles.contrastive)}, seen {plan.epochs:g} times each: theirs see most pictures once. Their "
        f"contrastive data is many times larger than the teacher's; here it is not. The tested concepts are "
        f"held out of all training here. Each number is a mean over {_seeds(plan)} seeds, in the ablations "
        f"{len(plan.ablations.seeds)}."
    )
    yield Text(
        f"The teachers of the *equal* arm have the main tower's architecture and input size, as in the papers, and "
        f"are pretrained here: on subgroups of the training concepts in the styles {_words(plan.styles.teacher)}, "
        f"which the contrastive data leaves out; on Fashion-MNIST; or not at all. Those of the *large* arm were "
        f"pretrained by others on ImageNet and are many times the size of the main tower, which is not the papers' "
        f"setting. Claims that are remembered of a paper rather than read in it say so."
    )
    for name, reason in findings.missing.items():
        yield Text(f"Left out: teacher `{name}`, which could not be had on this machine ({reason}).")


def _seeds(plan: Plan) -> str:
    counts = {len(cell.seeds or plan.seeds) for cell in plan.grid}
    return " or ".join(map(str, sorted(counts)))


def _words(names: Sequence[str]) -> str:
    return " and ".join(names)
