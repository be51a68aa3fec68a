"""The documentation: links lead somewhere, and commands have the flags that they need."""

import re
import shlex
from collections.abc import Iterator
from functools import wraps
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tyro

from threetowers.cache import cli as cache
from threetowers.cli import refuse_repeated_flags
from threetowers.eval import cli as evaluation
from threetowers.trainer import cli as trainer

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "data/**/*.md", "reproduce/*.md", "kernels/**/*.md", "configs/**/*.md")
    for page in ROOT.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_not_broken(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.relative_to(ROOT)}: {link} leads nowhere"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.relative_to(ROOT)}: {link}: no such heading"


def test_named_files_exist() -> None:
    """Files of the repository are named by their path; a page that names one which has moved is out of date."""
    named = re.compile(
        r"`((?:cache|trainer|eval|kernels|tests|configs|reproduce|data|docs)/[\w./-]+\.(?:py|md|yaml|cpp|cu|h|html))`"
    )
    missing = {
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        if page.name != "RESULTS.md"
        for path in named.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists()
    }
    assert not missing


COMMANDS: dict[str, Any] = {"cache": cache, "tokenizer": trainer, "eval": evaluation}
FUNCTIONS = {"import": "import_", "measure-views": "measure_views"}  # those that are not named as their command


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `threetowers` command in the blocks of a page, but of outlines with dots."""
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
            lexer.whitespace_split = True
            try:
                words = list(lexer)
            except ValueError:  # no command: an apostrophe of a sentence, say
                continue
            if "threetowers" not in words:
                continue
            found = list(takewhile(lambda word: word[0] not in ";|&<>", words[words.index("threetowers") + 1 :]))
            if found[0] in (*COMMANDS, "train", "export") and not any(word.endswith("...") for word in found):
                yield found


def parse_arguments(arguments: list[str]) -> None:
    """Parse the arguments of a command without running it. Raises SystemExit for what it does not take."""
    first, second = arguments[0], arguments[1]
    if first in COMMANDS:
        name = "train_tokenizer" if first == "tokenizer" else FUNCTIONS.get(second, second)
        function, flags = getattr(COMMANDS[first], name), arguments[2:]
    else:
        function, flags = getattr(trainer, first), arguments[1:]
    tyro.cli(wraps(function)(lambda *_, **__: None), args=flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_flags_that_they_need(page: Path) -> None:
    for arguments in commands(page):
        refuse_repeated_flags(arguments)
        try:
            parse_arguments(arguments)
        except SystemExit:
            pytest.fail(f"{page.relative_to(ROOT)}: threetowers {' '.join(arguments)}: see what was printed")


def test_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```\ntorchrun -m threetowers cache info A \\\n    --json 'a b'; echo  # why\n"
        "threetowers eval suite MODEL...\n```\n"
        "threetowers train\n```python\nimport threetowers as tt\n```\n"
    )
    assert list(commands(page)) == [["cache", "info", "A", "--json", "a b"]]
