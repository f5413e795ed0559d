"""Write measured pages, such as docs/results/benchmarks.md, with what made them and a section for each measurement."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from smpo_common.files import write_bytes
from smpo_models.devices import device_in_words

BENCHMARKS = Path(__file__).parents[1] / "docs/results/benchmarks.md"
_TITLE = "# Benchmarks\n\nRatios are taken within one run; rates of one run say little of another machine.\n"


def stamp(command: str, libraries: Sequence[str], cores: int = os.cpu_count() or 1, device: str = "cpu") -> str:
    """The command, the date, the machine and the versions, as two lines of a page that this program writes."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    today = dt.datetime.now(dt.UTC).date()
    machine = f"{cores} CPU core{'s' if cores > 1 else ''} ({platform.machine()})"
    if device != "cpu":
        machine = f"{device_in_words(device)}, {machine}"
    return (
        f"Made by `{command}` on {today}: {machine},\n"
        f"Python {platform.python_version()}, {versions}. Do not edit by hand."
    )


def write_section(title: str, text: str, page: Path = BENCHMARKS) -> None:
    """Put a section of a page in the place of the one of this title, or at the end."""
    written = page.read_text(encoding="utf-8") if page.is_file() else _TITLE
    head, *sections = written.rstrip().split("\n\n## ")
    by_title = {section.partition("\n")[0]: section for section in sections}
    by_title[title] = f"{title}\n\n{text.strip()}"
    write_bytes(page, ("\n\n## ".join([head.rstrip(), *by_title.values()]) + "\n").encode())
