"""The README.md of a repository: metadata, a title, sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CardData

from smpo_common.errors import UserError, one_line

CARD_FILE = "README.md"

_MARK = "<!-- Written by smpo-diffusion. Remove this line to keep your changes: the card is then pushed as it is. -->"

SMPO_CITATION = """```bibtex
@inproceedings{lu2025smoothed,
  title = {Smoothed Preference Optimization via {ReNoise} Inversion for Aligning Diffusion Models with Varied Human
           Preferences},
  author = {Lu, Yunhong and Wang, Qichao and Cao, Hengyuan and Xu, Xiaoyin and Zhang, Min},
  booktitle = {Proceedings of the 42nd International Conference on Machine Learning},
  volume = {267},
  pages = {40709--40725},
  year = {2025},
  note = {arXiv:2506.02698}
}
```"""


def compose(data: CardData, title: str, introduction: str, sections: Mapping[str, str]) -> str:
    """Put a card together; sections without text are left out."""
    parts = [f"---\n{data.to_yaml()}\n---", _MARK, f"# {title}", introduction]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def table(columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """Format a Markdown table; each cell becomes one line, whatever text it holds."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return one_line(str(value)).replace("|", "\\|").replace("<", "&lt;")


def shared_name(place: str) -> str:
    """Return a name to publish for a model or data set: only the last part of a local path, which may be private."""
    return Path(place).name if Path(place).is_absolute() or Path(place).exists() else place


def own_card(folder: Path) -> str | None:
    """Return the folder's README.md if the user wrote or changed it, else None.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / CARD_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else _MARK
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return None if _MARK in text else text
