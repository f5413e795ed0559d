"""Describe a file or folder of pairs."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from smpo_common.errors import one_line
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import worker_decoder
from smpo_pipeline.inspection import sheet
from smpo_pipeline.terminal import QUANTILE_NAMES, counted, facts, make_table, percent, quantile_cells
from smpo_schemas.labels import TIE
from smpo_schemas.pairs import (
    Layout,
    Pair,
    PairRejectedError,
    ReadingChoices,
    layouts_of,
    list_pair_files,
    read_rows,
    slice_files,
)
from smpo_schemas.rejects import Reject, count_reasons

TILE = 176
"""Side of a picture on the sheet, in pixels."""


@dataclass(frozen=True)
class ImageHeader:
    """Format and PIL mode of the file; width and height in pixels after its EXIF rotation; file size in bytes."""

    format: str
    mode: str
    width: int
    height: int
    bytes: int


@dataclass
class PairsSummary:
    """Counts over the rows that were read.

    Attributes:
        files, rows: number of files, and of rows in all of them.
        layouts: number of files by layout and its reading of the columns.
        rows_read: number of rows that were read.
        rejects: rows that are malformed or have an unusable image.
        labels: number of rows by label: ``image_0``, ``image_1``, ``tie``, ``soft`` (between), ``none``.
        annotators, prompts, pair_ids: number of rows by value.
        headers: one per image that could be decoded.
        chosen: pairs for the contact sheet.
    """

    files: int
    rows: int
    layouts: Counter[str] = field(default_factory=Counter)
    rows_read: int = 0
    rejects: list[Reject] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    annotators: Counter[str] = field(default_factory=Counter)
    prompts: Counter[str] = field(default_factory=Counter)
    pair_ids: Counter[str] = field(default_factory=Counter)
    headers: list[ImageHeader] = field(default_factory=list)
    chosen: list[Pair] = field(default_factory=list)


def summarise_pairs(
    path: Path,
    choices: ReadingChoices,
    *,
    limit: int | None,
    samples: int,
    advance: Callable[[int, int], None],
) -> PairsSummary:
    """Read every row, decode every image, and choose evenly spaced pairs for the sheet.

    Args:
        path: file or folder.
        choices: what flags say about reading it.
        limit: maximum number of rows to read.
        samples: number of pairs for the sheet.
        advance: called with the number of rows read so far and the number of rows to read.
    """
    files = list_pair_files([path], choices)
    layouts = layouts_of(files)
    summary = PairsSummary(len(files), sum(file.rows for file in files))
    summary.layouts.update(map(_describe_layout, layouts.values()))
    total = min(summary.rows, limit) if limit else summary.rows
    chosen = set(np.linspace(0, max(0, total - 1), min(samples, total)).round().astype(int).tolist())
    for rows in (rows for unit in slice_files(files, max(1, summary.rows), limit) for rows in unit):
        for source, pair in read_rows(rows, layouts[rows.path]):
            if isinstance(pair, PairRejectedError):
                summary.rejects.append(Reject(pair_id=None, source=source, stage="inspect", reason=str(pair)))
            else:
                _count(summary, source, pair)
                if summary.rows_read in chosen:
                    summary.chosen.append(pair)
            summary.rows_read += 1
            advance(summary.rows_read, total)
    return summary


def _count(summary: PairsSummary, source: str, pair: Pair) -> None:
    summary.labels[_label_name(pair.label)] += 1
    summary.annotators[pair.annotator or ""] += 1
    summary.prompts[pair.prompt] += 1
    summary.pair_ids[pair.pair_id] += 1
    try:
        summary.headers += [_read_header(data) for data in (pair.image_0, pair.image_1)]
    except ImageRejectedError as reason:
        summary.rejects.append(Reject(pair_id=pair.pair_id, source=source, stage="inspect", reason=str(reason)))


def _read_header(data: bytes) -> ImageHeader:
    """Decode the whole image, as the pipeline does, and describe it.

    Raises:
        ImageRejectedError: the pipeline would reject it.
    """
    height, width, _ = worker_decoder().decode(data).shape
    with Image.open(io.BytesIO(data)) as image:
        return ImageHeader(image.format or "?", image.mode, width, height, len(data))


def _label_name(label: float | None) -> str:
    if label is None:
        return "none"
    return {1.0: "image_0", 0.0: "image_1", TIE: "tie"}.get(label, "soft")


def print_pairs(summary: PairsSummary, path: Path, console: Console) -> None:
    """Print the summary."""
    total = summary.rows_read
    labels = ", ".join(f"{name} {count} ({percent(count, total)})" for name, count in summary.labels.most_common())
    repeated = sum(count - 1 for count in summary.pair_ids.values())
    people = {name: count for name, count in summary.annotators.items() if name}
    anonymous = summary.annotators[""]
    console.print(
        facts(
            f"pairs: {path}",
            {
                "rows": f"{summary.rows} in {summary.files} files; {total} read",
                "usable": f"{total - len(summary.rejects)} pairs; {len(summary.rejects)} would be rejected",
                "layout": "; ".join(summary.layouts),
                "preferred": labels,
                "annotators": f"{len(people)}: {counted(people)}" + (f"; {anonymous} unnamed" if anonymous else ""),
                "prompts": f"{len(summary.prompts)} distinct; {summary.prompts.get('', 0)} rows have an empty prompt",
                "pair ids": f"{len(summary.pair_ids)} distinct; {repeated} rows repeat an id"
                if repeated
                else "all distinct",
                "formats": counted(Counter(header.format for header in summary.headers)),
                "modes": counted(Counter(header.mode for header in summary.headers)),
                "sizes": counted(Counter(f"{header.width}x{header.height}" for header in summary.headers)),
            },
        )
    )
    lengths = np.array([len(prompt.split()) for prompt in summary.prompts.elements()])
    table = make_table("lengths and sizes", ("", "smallest", *QUANTILE_NAMES, "largest"))
    numbers: dict[str, np.ndarray] = {
        "prompt, words": lengths,
        "width, pixels": np.array([header.width for header in summary.headers]),
        "height, pixels": np.array([header.height for header in summary.headers]),
        "file, kB": np.array([header.bytes / 1000 for header in summary.headers]),
    }
    for name, values in numbers.items():
        if len(values):
            table.add_row(name, f"{values.min():.3g}", *quantile_cells(values), f"{values.max():.3g}")
    console.print(table)
    print_rejects(summary.rejects, console)


def _describe_layout(layout: Layout) -> str:
    taken = layout.describe()
    missing = [f"no {name}" for name in ("label", "pair_id", "annotator") if not taken.keys() & _SAY.get(name, {name})]
    parts = [f"{name} from {source}" for name, source in taken.items()]
    return f"{layout.name}: {', '.join([*parts, *missing])}; images relative to {layout.folder}"


_SAY = {"label": {"label", "chosen"}}
"""Fields, any one of which provides the value that the key names; other values come from the field of their name."""


def print_rejects(rejects: list[Reject], console: Console) -> None:
    """Print the number of rejected rows by kind of reason, with one example of each."""
    if not rejects:
        return
    table = make_table("rejected", ("reason", "example", "rows"), text_columns=2)
    for reason, count in count_reasons(rejects).items():
        example = next(reject for reject in rejects if reject.kind == reason)
        table.add_row(one_line(reason), one_line(f"{example.source}: {example.reason}"), f"{count}")
    console.print(table)


def draw_pairs(summary: PairsSummary, path: Path, scores: Mapping[str, Mapping[str, Any]]) -> Image.Image:
    """Draw the contact sheet: both images of each chosen pair, with prompt, label and scores.

    Args:
        summary: has the chosen pairs.
        path: the file or folder of pairs.
        scores: by pair id, the rewards' columns of a scores table; may lack pairs.
    """
    cards = [_card(pair, scores.get(pair.pair_id, {})) for pair in summary.chosen]
    subtitle = f"{len(cards)} of {summary.rows_read} pairs, evenly spaced; the preferred image is framed in green"
    return sheet.page(f"Pairs: {path.resolve().name}", subtitle, cards, columns=3)


def _card(pair: Pair, scores: Mapping[str, Any]) -> Image.Image:
    preferred = {"image_0": 0, "image_1": 1}.get(_label_name(pair.label))
    images = sheet.row(
        [
            decoded_tile(data, TILE, frame=sheet.WINNER if preferred == number else None)
            for number, data in enumerate((pair.image_0, pair.image_1))
        ]
    )
    annotator = f", by {pair.annotator}" if pair.annotator else ""
    label = {"none": "no label", "tie": "tie", "soft": f"P(left) = {pair.label}"}.get(
        _label_name(pair.label), "left preferred" if preferred == 0 else "right preferred"
    )
    lines = [
        sheet.text_block(pair.prompt or "(empty prompt)", images.width, lines=3),
        sheet.text_block(label + annotator, images.width, size=12, colour=sheet.SOFT, lines=1),
    ]
    for name in (column.removesuffix("_0") for column in scores if column.endswith("_0")):
        values = f"{name}: {scores[f'{name}_0']:.4g} | {scores[f'{name}_1']:.4g}"
        lines.append(sheet.text_block(values, images.width, size=12, colour=sheet.SOFT, lines=1))
    return sheet.column([images, *lines], padding=12)


def decoded_tile(data: bytes, side: int, *, frame: str | None) -> Image.Image:
    """Decode an image file and draw it as :func:`sheet.tile`; one that cannot be decoded says why."""
    try:
        image, note = Image.fromarray(worker_decoder().decode(data)), ""
    except ImageRejectedError as reason:
        image, note = None, str(reason)
    return sheet.tile(image, side, frame=frame, note=note)
