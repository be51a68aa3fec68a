"""Section: the setting of the experiments, before any result."""

from collections.abc import Iterator
from string import Template

from reproduce.folder import read_json
from reproduce.report.document import Element, Heading, Paragraph
from reproduce.report.report_data import ReportData


def setting_section(data: ReportData) -> Iterator[Element]:
    """Yield the paragraphs of the claims on the setting, and the teachers that are left out."""
    plan = data.plan
    counts = read_json(data.folder["data/splits.json"])["samples"]
    facts = {
        "samples": f"{counts['train']:,}",
        "seeds": " or ".join(map(str, sorted({len(cell.seeds or plan.seeds) for cell in plan.grid}))),
        "ablation_seeds": str(len(plan.ablations.seeds)),
        "epochs": f"{plan.epochs:g}",
        "contrastive": " and ".join(plan.styles.contrastive),
        "teacher": " and ".join(plan.styles.teacher),
    }
    yield Heading(data.claims.setting_title)
    for text in data.claims.setting:
        yield Paragraph(Template(text).substitute(facts))
    for name, reason in data.missing.items():
        yield Paragraph(f"Left out: teacher `{name}`, which could not be had on this machine ({reason}).")
