"""Section: differences from the papers, before any result."""

from collections.abc import Iterator

from reproduce.folder import read_json
from reproduce.report.document import Element, Heading, Paragraph
from reproduce.report.report_data import ReportData


def setting_section(data: ReportData) -> Iterator[Element]:
    """Yield the differences from the papers, and the teachers that are left out."""
    plan = data.plan
    counts = read_json(data.folder["data/splits.json"])["samples"]
    seeds = " or ".join(map(str, sorted({len(cell.seeds or plan.seeds) for cell in plan.grid})))
    contrastive = " and ".join(plan.styles.contrastive)
    teacher = " and ".join(plan.styles.teacher)
    yield Heading("What differs from the papers")
    yield Paragraph(
        f"Scale, by many orders of magnitude. The papers train ViT-L/16 on billions of pairs from the web; here "
        f"the main image tower is timm's `{plan.pretraining.model}` (for MS-CLIP, a small transformer), trained "
        f"from nothing on {counts['train']:,} emoji drawings of {plan.pretraining.image_size} pixels in the styles "
        f"{contrastive}, seen {plan.epochs:g} times each: theirs see most images once. Their "
        f"contrastive data is many times larger than the teacher's; here it is not. The tested concepts are "
        f"held out of all training here. Each number is a mean over {seeds} seeds, in the ablations "
        f"{len(plan.ablations.seeds)}."
    )
    yield Paragraph(
        f"The teachers of the *equal* arm have the main tower's architecture and input size, as in the papers, and "
        f"are pretrained here: on subgroups of the training concepts in the styles {teacher}, "
        f"which the contrastive data leaves out; on Fashion-MNIST; or not at all. Those of the *large* arm were "
        f"pretrained by others on ImageNet and are many times the size of the main tower, which is not the papers' "
        f"setting. Claims that are remembered of a paper rather than read in it say so."
    )
    for name, reason in data.missing.items():
        yield Paragraph(f"Left out: teacher `{name}`, which could not be had on this machine ({reason}).")
