"""The code in README.md and docs/guide: fenced blocks, and blocks indented by four spaces."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:    .*\n|\n(?=\n*    ))+")
_PROGRAM = re.compile(
    r"(?:^|&& |docker run .*)(?:\w+=\S+ )*smpo-(pipeline|train) |^(?:torchrun|accelerate|python3?) .*-m smpo_(trainer) "
)
"""A command line of ours: by itself, in a container, or under a launcher."""


@dataclass(frozen=True)
class Block:
    """One code block: its place as ``page:line``, its language ("" where none is named) and its text."""

    place: str
    language: str
    code: str


def code_blocks(page: Path) -> Iterator[Block]:
    """All code blocks of a page."""
    text = page.read_text(encoding="utf-8")

    def place(start: int) -> str:
        return f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, start) + 1}"

    for found in _FENCED.finditer(text):
        yield Block(place(found.start()), found[1], found[2])
    without_fences = _FENCED.sub(lambda found: re.sub(r"[^\n]", "", found[0]), text)
    for found in _INDENTED.finditer(without_fences):
        code = textwrap.dedent(found[0]).strip("\n") + "\n"
        yield Block(place(found.start()), "python" if re.match(r"(import|from) ", code) else "", code)


def commands(page: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Each command line of ours in a page's code, as (place, ``pipeline`` or ``train``, arguments)."""
    for block in code_blocks(page):
        if block.language in {"", "bash", "sh", "console"}:
            for line in block.code.replace("\\\n", " ").splitlines():
                called = _PROGRAM.search(line)
                if called:
                    program = (called[1] or called[2]).replace("trainer", "train")
                    yield block.place, program, shlex.split(line[called.end() :], comments=True)


def python_blocks(page: Path) -> Iterator[Block]:
    """The Python blocks of a page."""
    return (block for block in code_blocks(page) if block.language == "python")
