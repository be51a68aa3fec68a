"""Plots as inline SVG with the colours and the font of the page, light or dark."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from io import StringIO
from typing import Any

# Placeholder colours that matplotlib draws with; in the SVG they become variables of the page.
INK, LINE = "#010203", "#010204"
RUN_COLOURS = 8
DASHES = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
DASH_ARRAYS = ("none", "9 3", "3 2", "10 3 2 3")  # the same, for the legend's swatches


@dataclass(frozen=True)
class Panel:
    """One plot. `svg` is trusted markup, made here; `title` is text."""

    title: str
    svg: str


def run_colour(index: int) -> str:
    """Return the placeholder of the colour of a run."""
    return f"#0102{0x10 + index % RUN_COLOURS:02x}"


def _style() -> Any:
    """Return matplotlib settings of all plots."""
    return {
        "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
        "font.family": "sans-serif",
        "font.size": 10,
        "text.parse_math": False,  # a $ in a name is a $
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.edgecolor": LINE,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "axes.grid": True,
        "grid.color": LINE,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "axes.formatter.useoffset": False,
    }


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of some width and height in inches, and its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def to_svg(figure: Any, name: str) -> str:
    """Return a figure as an <svg> element of no fixed size, without any outside reference.

    Args:
        figure: The figure.
        name: Unique within a page: the ids in the SVG are derived from it.
    """
    import matplotlib

    buffer = StringIO()
    with matplotlib.rc_context(_style() | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()

    # Remove namespaces, metadata, ids that nothing refers to, and the fixed size.
    used = set(re.findall(r"(?:url\(|href=\")#(\w+)", text))
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if "style" in attributes:
            attributes["style"] = _page_style(attributes["style"])
        element.attrib = attributes
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    return ElementTree.tostring(root, encoding="unicode")


def _page_style(style: str) -> str:
    """Return a style without its font family, in the colour variables of the page."""
    style = re.sub(r"font: ([\d.]+px) [^;]*", r"font-size: \1", style)
    style = re.sub(r"font-family: [^;]*;? ?", "", style)
    style = style.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return re.sub(r"#0102(1[0-7])", lambda match: f"var(--run-{int(match[1], 16) - 0x10})", style)
