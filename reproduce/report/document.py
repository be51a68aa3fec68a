"""A document of headings, paragraphs, tables and plots, written as Markdown and as one HTML page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from threetowers.eval.report.svg import Panel
from threetowers.eval.report.tables import markdown_text

COLOURS = """
:root { --ink: #1c1c1c; --line: #d8d8d8; --run-0: #0b6fa4; --run-1: #c4511b; --run-2: #2b8a3e; --run-3: #8a3ab9;
  --run-4: #b0892a; --run-5: #16807a; --run-6: #b83268; --run-7: #5b6470; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --line: #444; --run-0: #5ab4e5; --run-1: #f0935f;
  --run-2: #6fce82; --run-3: #c68cf0; --run-4: #e0c060; --run-5: #56c8c0; --run-6: #ee7aa8; --run-7: #a8b2bf; } }
"""
SHORT = 20  # characters
PAGE = """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.short { white-space: nowrap; }
figure { margin: 1rem 0; max-width: 46rem; } figcaption { font-size: 90%; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph; `code` and *emphasis* are marked as in Markdown."""

    text: str


@dataclass(frozen=True)
class Rows:
    """A table of plain texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A plot. `name`: of its file, beside a document in Markdown."""

    panel: Panel
    name: str


Block = Heading | Text | Rows | Plot


def markdown(blocks: Sequence[Block], plots: str) -> str:
    """The document in Markdown; `plots`: the folder of the files of `drawings`."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Text(text):
                parts.append(text)
            case Rows(heads, rows):
                lines = [list(heads), ["---"] * len(heads), *([markdown_text(c) for c in row] for row in rows)]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
            case Plot(panel, name):
                parts.append(f"![{panel.title}]({plots}/{name}.svg)\n\n*{panel.title}*")
    return "\n\n".join(parts) + "\n"


def drawings(blocks: Sequence[Block]) -> dict[str, str]:
    """The plots as images of their own, which bring the colours that a page would give them, by file name."""
    style = f"<style>{COLOURS}text {{ font-family: sans-serif; }}</style>"
    found = {}
    for block in blocks:
        if isinstance(block, Plot):
            opening, bracket, rest = block.panel.svg.partition(">")
            opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
            found[f"{block.name}.svg"] = f"{opening}{bracket}{style}{rest}"
    return found


def html(blocks: Sequence[Block], title: str) -> str:
    """The document as a page without scripts that asks for nothing from outside."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{escape(text)}</h{level}>")
            case Text(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Rows(heads, rows):
                head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
                body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
                parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            case Plot(panel, _):  # markup of our own drawing
                parts.append(f"<figure>{panel.svg}<figcaption>{escape(panel.title)}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{COLOURS}{PAGE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _cell(text: str) -> str:
    """Numbers, intervals and verdicts stay on a line; sentences may not."""
    kind = " class=short" if len(text) <= SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


def _inline(text: str) -> str:
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", found)
