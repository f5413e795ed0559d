"""Print what a selection chose."""

from __future__ import annotations

from rich.console import Console

from smpo_common.store_path import AnyPath
from smpo_pipeline.terminal import counted, facts
from smpo_schemas.generation.selection import SelectionInfo
from smpo_schemas.rejects import REJECTS_FILE


def print_selection(info: SelectionInfo, out: AnyPath, console: Console) -> None:
    """Print the numbers of a selection."""
    gaps = info.gaps
    rows = {
        "candidates": f"{info.images} images of {info.prompts} prompts, in {info.rows} rows",
        "pairs": f"{info.pairs}, from {info.prompts_with_pairs} of the prompts",
        "mean gap": f"{gaps.mean:.3f} ({gaps.min:.3f} to {gaps.max:.3f})",
        "rejected": f"{counted(info.reasons)}; see {out / REJECTS_FILE}" if info.rejected else "none",
    }
    if info.shown_first is not None:
        position = f"the image shown first got {info.shown_first:.3f} of the preference (0.5: no bias; it cancels)"
        rows["judge"] = f"{info.comparisons} comparisons in both orders; {position}"
    console.print(facts(f"selection by {info.settings.by}: {out}", rows))
