"""``smpo-pipeline inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from smpo_common.options import Flag, Options
from smpo_pipeline.inspection.recognise import recognise
from smpo_pipeline.options import FILE, FOLDER, ColumnOptions, LocalPath, OutFile
from smpo_schemas.scoring.scores import read_scores, read_scores_info, score_columns


class InspectOptions(Options):
    """The flags of ``inspect``."""

    path: Annotated[LocalPath, Flag(typed=str, positional=True)]
    """Pairs (file or folder), or an output directory of score, select or invert."""
    out: Annotated[OutFile | None, FILE] = None
    """PNG file for the contact sheet. Default: inspect-NAME.png in the current folder."""
    samples: Annotated[int | None, Field(ge=0)] = None
    """Number of pairs or trajectories on the sheet; 0 for none. Default: 12 pairs, 4 trajectories."""
    model: Annotated[str | None, Flag(metavar="DIR")] = None
    """For shards: model to decode latents with. Default: the manifest's."""
    vae: Annotated[str | None, Flag(metavar="DIR")] = None
    """For shards made with --vae: the same VAE."""
    scores: Annotated[LocalPath | None, FOLDER] = None
    """For pairs: output directory of score, to show their scores on the sheet."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Use only the first N pairs or trajectories."""
    columns: ColumnOptions = ColumnOptions()


def inspect(options: InspectOptions) -> None:
    """Describe pairs, scores, a selection or shards: statistics, and a contact sheet of images.

    Examples:
        smpo-pipeline inspect shards
    """
    console = Console(markup=False)  # prints text from files
    kind, folder = recognise(options.path)
    target = options.out or Path(f"inspect-{folder.resolve().stem}.png")
    if kind == "pairs":
        _inspect_pairs(folder, options, console, target)
    elif kind == "scores":
        _inspect_scores(folder, console)
    elif kind == "selection":
        _inspect_selection(folder, options, console, target)
    else:
        _inspect_shards(folder, options, console, target)


def _inspect_pairs(path: Path, options: InspectOptions, console: Console, target: Path) -> None:
    from smpo_pipeline.inspection.pairs import draw_pairs, print_pairs, summarise_pairs  # noqa: PLC0415
    from smpo_pipeline.inspection.sheet import save_sheet  # noqa: PLC0415

    rows: dict[str, Any] = {}
    if options.scores:
        info = read_scores_info(options.scores)
        columns = ["pair_id", *score_columns(info.rewards)]
        rows = {row["pair_id"]: row for row in read_scores(options.scores, info, columns).to_pylist()}
    samples = 12 if options.samples is None else options.samples
    with _progress(console, "reading pairs") as advance:
        choices = options.columns.choices()
        summary = summarise_pairs(path, choices, limit=options.limit, samples=samples, advance=advance)
    print_pairs(summary, path, console)
    if summary.chosen:
        save_sheet(draw_pairs(summary, path, rows), target)
        console.print(f"contact sheet: {target}", highlight=False, soft_wrap=True)


def _inspect_scores(path: Path, console: Console) -> None:
    from smpo_pipeline.inspection.scores import print_scores, summarise_scores  # noqa: PLC0415

    print_scores(summarise_scores(path), path, console)
    console.print(
        f"Scores hold no images; to see them, run: smpo-pipeline inspect PAIRS --scores {path}",
        highlight=False,
        soft_wrap=True,
    )


def _inspect_selection(path: Path, options: InspectOptions, console: Console, target: Path) -> None:
    from smpo_pipeline.inspection.selection import (  # noqa: PLC0415
        draw_selection,
        print_selection_summary,
        summarise_selection,
    )
    from smpo_pipeline.inspection.sheet import save_sheet  # noqa: PLC0415

    samples = 12 if options.samples is None else options.samples
    with _progress(console, "reading pairs") as advance:
        summary = summarise_selection(path, limit=options.limit, samples=samples, advance=advance)
    print_selection_summary(summary, path, console)
    if summary.chosen:
        save_sheet(draw_selection(summary, path), target)
        console.print(f"contact sheet: {target}", highlight=False, soft_wrap=True)


def _inspect_shards(path: Path, options: InspectOptions, console: Console, target: Path) -> None:
    from smpo_pipeline.inspection.shards import print_shards, summarise_shards  # noqa: PLC0415
    from smpo_pipeline.inspection.sheet import save_sheet  # noqa: PLC0415  (torch and diffusers: not for --help)
    from smpo_pipeline.inspection.trajectories import draw_shards, load_decoder  # noqa: PLC0415

    samples = 4 if options.samples is None else options.samples
    with _progress(console, "reading trajectories") as advance:
        summary = summarise_shards(path, limit=options.limit, samples=samples, advance=advance)
    print_shards(summary, path, console)
    if summary.chosen:
        family = load_decoder(summary.manifest, options.model, options.vae, "cpu")
        save_sheet(draw_shards(summary.chosen, summary.manifest, family, path), target)
        console.print(f"contact sheet: {target}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar while the block runs; yield a function that sets (done, total)."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
