"""Write the pages of docs/results: each one begins with the command, date, machine and versions that made it."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from smpo_common.files import write_bytes
from smpo_models.devices import device_in_words

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
IMAGES = RESULTS / "images"
BENCHMARKS = RESULTS / "benchmarks.md"
_TITLE = "# Benchmarks\n\nRatios are taken within one run; rates of one run say little of another machine.\n"


def stamp(command: str, libraries: Sequence[str], cores: int = os.cpu_count() or 1, device: str = "cpu") -> str:
    """Format the command, the date, the machine and the versions as the first two lines of a page or section."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    today = dt.datetime.now(dt.UTC).date()
    machine = f"{cores} CPU core{'s' if cores > 1 else ''} ({platform.machine()})"
    if device != "cpu":
        machine = f"{device_in_words(device)}, {machine}"
    return (
        f"Made by `{command}` on {today}: {machine},\n"
        f"Python {platform.python_version()}, {versions}. Do not edit by hand."
    )


def write_page(page: Path, title: str, text: str) -> None:
    """Write a whole page, and print it."""
    print(text)
    write_bytes(page, f"# {title}\n\n{text.strip()}\n".encode())


def write_section(title: str, text: str) -> None:
    """Replace the section of this title in docs/results/benchmarks.md, or append it."""
    written = BENCHMARKS.read_text(encoding="utf-8") if BENCHMARKS.is_file() else _TITLE
    head, *sections = written.rstrip().split("\n\n## ")
    by_title = {section.partition("\n")[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{text.strip()}"
    write_bytes(BENCHMARKS, ("\n\n## ".join([head.rstrip(), *by_title.values()]) + "\n").encode())
