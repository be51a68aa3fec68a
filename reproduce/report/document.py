"""A document of headings, paragraphs, tables and figures, written as Markdown and as one HTML page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from threetowers.eval.report.svg import Panel
from threetowers.eval.report.tables import markdown_table, markdown_text

COLOURS = """
:root { --ink: #1c1c1c; --line: #d8d8d8; --run-0: #0b6fa4; --run-1: #c4511b; --run-2: #2b8a3e; --run-3: #8a3ab9;
  --run-4: #b0892a; --run-5: #16807a; --run-6: #b83268; --run-7: #5b6470; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --line: #444; --run-0: #5ab4e5; --run-1: #f0935f;
  --run-2: #6fce82; --run-3: #c68cf0; --run-4: #e0c060; --run-5: #56c8c0; --run-6: #ee7aa8; --run-7: #a8b2bf; } }
"""
SHORT_CELL = 20  # characters
PAGE = """
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; vertical-align: top; }
td.short { white-space: nowrap; }
figure { margin: 1rem 0; max-width: 46rem; } figcaption { font-size: 90%; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `code` and *emphasis* are marked as in Markdown."""

    text: str


@dataclass(frozen=True)
class TextTable:
    """A table of plain texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A plot; `name` is that of its file beside a document in Markdown."""

    panel: Panel
    name: str


Element = Heading | Paragraph | TextTable | Figure


def markdown(elements: Sequence[Element], plots: str) -> str:
    """Return the document in Markdown; `plots` is the folder of the files of `figure_files`."""
    parts = []
    for element in elements:
        match element:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case TextTable(heads, rows):
                parts.append(markdown_table(heads, [[markdown_text(cell) for cell in row] for row in rows]))
            case Figure(panel, name):
                parts.append(f"![{panel.title}]({plots}/{name}.svg)\n\n*{panel.title}*")
    return "\n\n".join(parts) + "\n"


def figure_files(elements: Sequence[Element]) -> dict[str, str]:
    """Return the plots as SVG images by file name, with the colours that the page would define."""
    style = f"<style>{COLOURS}text {{ font-family: sans-serif; }}</style>"
    files = {}
    for element in elements:
        if isinstance(element, Figure):
            opening, bracket, rest = element.panel.svg.partition(">")
            opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
            files[f"{element.name}.svg"] = f"{opening}{bracket}{style}{rest}"
    return files


def html(elements: Sequence[Element], title: str) -> str:
    """Return the document as a page without scripts and without any outside request."""
    parts = []
    for element in elements:
        match element:
            case Heading(text, level):
                parts.append(f"<h{level}>{escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case TextTable(heads, rows):
                head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
                body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
                parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
            case Figure(panel, _):  # trusted markup, made by matplotlib
                parts.append(f"<figure>{panel.svg}<figcaption>{escape(panel.title)}</figcaption></figure>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{COLOURS}{PAGE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _cell(text: str) -> str:
    """Return a cell of a table; short ones, as numbers and verdicts, are not wrapped."""
    kind = " class=short" if len(text) <= SHORT_CELL else ""
    return f"<td{kind}>{escape(text)}</td>"


def _inline(text: str) -> str:
    """Return a paragraph with its code and emphasis as HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)
