"""docs/benchmarks.md: one section a benchmark, each rewritten by its own command and stamped with where it was run."""

from __future__ import annotations

import datetime as dt
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from smpo_schemas.files import write_bytes

PAGE = Path(__file__).parents[1] / "docs/benchmarks.md"
_TITLE = """# Benchmarks

Every section is written by the command that it names. These machines are noisy: the ratios, taken within one run, are
what counts.
"""
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "ray", "numpy")


def machine() -> str:
    """When, on what and with which versions something was measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    today = dt.datetime.now(tz=dt.UTC).date()
    cores = f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
    return f"{today}, {cores}, Python {platform.python_version()}, {versions}"


def write_section(title: str, command: str, lines: Iterable[str]) -> None:
    """Put a section in the place of the one of this title, or at the end."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else _TITLE
    head, *sections = text.split("\n## ")
    body = "\n".join(lines)
    new = f"{title}\n\n    {command}\n\n{machine()}.\n\n{body}\n"
    kept = [section if section.endswith("\n") else f"{section}\n" for section in sections]
    titles = [section.partition("\n")[0] for section in kept]
    if title in titles:
        kept[titles.index(title)] = new
    else:
        kept.append(new)
    write_bytes(PAGE, "\n## ".join([head, *kept]).encode())
