"""Describe an output of ``select``, with the chosen and the rejected image of some pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from rich.console import Console

from smpo_pipeline.inspection import sheet
from smpo_pipeline.inspection.pairs import TILE, decoded_tile, print_rejects
from smpo_pipeline.selection.report import print_selection
from smpo_pipeline.terminal import histogram
from smpo_schemas.generation.selection import PAIRS_FILE, SCORES_FOLDER, SelectionInfo, read_selection
from smpo_schemas.pairs import Pair, PairRejectedError, layouts_of, list_pair_files, read_rows, slice_files
from smpo_schemas.rejects import REJECTS_FILE, Reject, read_rejects
from smpo_schemas.scoring.scores import read_scores, read_scores_info, score_columns

_BINS = 10


@dataclass
class SelectionSummary:
    """A selection.

    Attributes:
        info: ``selection.json``.
        rejects: rows and prompts that gave no pair.
        gaps: one per pair that was read.
        chosen: pairs for the contact sheet.
        scores: their rewards' columns of the scores table, by pair_id.
    """

    info: SelectionInfo
    rejects: list[Reject]
    gaps: list[float] = field(default_factory=list)
    chosen: list[Pair] = field(default_factory=list)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def summarise_selection(
    folder: Path, *, limit: int | None, samples: int, advance: Callable[[int, int], None]
) -> SelectionSummary:
    """Read the gaps of all pairs, and evenly spaced pairs for the sheet.

    Args:
        folder: output of ``select``.
        limit: maximum number of pairs to read.
        samples: number of pairs for the sheet.
        advance: called with the number of pairs read so far and the number of pairs to read.

    Raises:
        UserError: the output is unfinished or damaged.
    """
    summary = SelectionSummary(read_selection(folder), read_rejects(folder / REJECTS_FILE))
    files = list_pair_files([folder / PAIRS_FILE])
    layouts = layouts_of(files)
    total = min(files[0].rows, limit or files[0].rows)
    drawn = set(np.linspace(0, total - 1, min(samples, total)).round().astype(int).tolist())
    for rows in (rows for unit in slice_files(files, total, total) for rows in unit):
        for number, (_, pair) in enumerate(read_rows(rows, layouts[rows.path], ("chosen_image", "gap"))):
            if not isinstance(pair, PairRejectedError):
                summary.gaps.append(pair.further["gap"])
                if number in drawn:
                    summary.chosen.append(pair)
            advance(number + 1, total)
    names = [pair.pair_id for pair in summary.chosen]
    scores = folder / SCORES_FOLDER
    info = read_scores_info(scores)
    table = read_scores(scores, info, ["pair_id", *score_columns(info.rewards)])
    rows = table.filter(pc.is_in(table["pair_id"], pa.array(names, pa.string())))
    summary.scores = {row["pair_id"]: row for row in rows.to_pylist()}
    return summary


def print_selection_summary(summary: SelectionSummary, folder: Path, console: Console) -> None:
    """Print the summary."""
    print_selection(summary.info, folder, console)
    gaps = np.array(summary.gaps)
    edges = np.linspace(min(0.0, gaps.min()), max(gaps.max(), 1e-6), _BINS + 1)
    console.print(histogram("gap: by how much the chosen image is better", gaps, edges.tolist(), digits=3))
    print_rejects(summary.rejects, console)


def draw_selection(summary: SelectionSummary, folder: Path) -> Image.Image:
    """Draw each pair: the chosen image at the left, in green, the rejected one at the right, and their scores."""
    cards = [_card(pair, summary.scores.get(pair.pair_id, {})) for pair in summary.chosen]
    subtitle = f"{len(cards)} of {summary.info.pairs} pairs, evenly spaced; left: chosen, right: rejected"
    title = f"Selection by {summary.info.settings.by}: {folder.resolve().name}"
    return sheet.page(title, subtitle, cards, columns=3)


def _card(pair: Pair, scores: Mapping[str, Any]) -> Image.Image:
    chosen = int(pair.further["chosen_image"])
    files = (pair.image_0, pair.image_1)
    images = sheet.row(
        [decoded_tile(files[chosen], TILE, frame=sheet.WINNER), decoded_tile(files[1 - chosen], TILE, frame=None)]
    )
    lines = [sheet.text_block(pair.prompt or "(empty prompt)", images.width, lines=3)]
    rewards = [column.removesuffix("_0") for column in scores if column.endswith("_0")]
    notes = [f"gap {pair.further['gap']:.3f}"]
    notes += [f"{name}: {scores[f'{name}_{chosen}']:.4g} | {scores[f'{name}_{1 - chosen}']:.4g}" for name in rewards]
    lines += [sheet.text_block(note, images.width, size=12, colour=sheet.SOFT, lines=1) for note in notes]
    return sheet.column([images, *lines], padding=12)
