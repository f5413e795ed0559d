"""``smpo-pipeline inspect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from smpo_pipeline.commands.options import (
    AnnotatorColumn,
    Image0Column,
    Image1Column,
    LabelColumn,
    PairIdColumn,
    PromptColumn,
    columns_by_field,
    local_path,
    writable,
)
from smpo_pipeline.inspection.recognise import recognise
from smpo_schemas.scores import read_scores, read_scores_info


def inspect(
    path: Annotated[
        Path,
        typer.Argument(parser=local_path, help="Pairs (file or folder), an output of score, or an output of invert."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            callback=writable("--out", file=True),
            help="PNG for the contact sheet. Default: inspect-NAME.png in the current folder.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=0, help="Pairs or trajectories on the sheet; 0 for none. Default: 12 pairs, 4 trajectories."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="For shards: the model to decode with. Default: the manifest's."),
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="DIR", help="For shards made with --vae: that VAE.")] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", parser=local_path, help="For pairs: an output of score, to write their scores on the sheet."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Look only at the first N pairs or trajectories.")] = None,
    prompt_column: PromptColumn = None,
    image_0_column: Image0Column = None,
    image_1_column: Image1Column = None,
    label_column: LabelColumn = None,
    pair_id_column: PairIdColumn = None,
    annotator_column: AnnotatorColumn = None,
) -> None:
    """Say what is in pairs, scores or shards, in words and as a contact sheet."""
    console = Console(markup=False)  # what is printed comes from the files
    kind, folder = recognise(path)
    target = out or Path(f"inspect-{folder.resolve().stem}.png")
    if kind == "pairs":
        given = columns_by_field(
            prompt_column, image_0_column, image_1_column, label_column, pair_id_column, annotator_column
        )
        _inspect_pairs(folder, given, console, target, limit=limit, samples=samples, scores=scores)
    elif kind == "scores":
        _inspect_scores(folder, console)
    else:
        _inspect_shards(folder, console, target, limit=limit, samples=samples, model=model, vae=vae)


def _inspect_pairs(
    path: Path,
    given: dict[str, str | None],
    console: Console,
    target: Path,
    *,
    limit: int | None,
    samples: int | None,
    scores: Path | None,
) -> None:
    from smpo_pipeline.inspection.pairs import draw_pairs, print_pairs, summarise_pairs  # noqa: PLC0415
    from smpo_pipeline.inspection.sheet import save_sheet  # noqa: PLC0415

    rows: dict[str, Any] = {}
    if scores:
        rows = {row["pair_id"]: row for row in read_scores(scores, read_scores_info(scores)).to_pylist()}
    with _counting(console, "reading pairs") as advance:
        kept = 12 if samples is None else samples
        summary = summarise_pairs(path, given, limit=limit, samples=kept, advance=advance)
    print_pairs(summary, path, console)
    if summary.chosen:
        save_sheet(draw_pairs(summary, path, rows), target)
        console.print(f"contact sheet: {target}", highlight=False, soft_wrap=True)


def _inspect_scores(path: Path, console: Console) -> None:
    from smpo_pipeline.inspection.scores import print_scores, summarise_scores  # noqa: PLC0415

    print_scores(summarise_scores(path), path, console)
    console.print(
        f"A score holds no images; see them with: smpo-pipeline inspect PAIRS --scores {path}",
        highlight=False,
        soft_wrap=True,
    )


def _inspect_shards(
    path: Path,
    console: Console,
    target: Path,
    *,
    limit: int | None,
    samples: int | None,
    model: str | None,
    vae: str | None,
) -> None:
    from smpo_pipeline.inspection.shards import print_shards, summarise_shards  # noqa: PLC0415
    from smpo_pipeline.inspection.sheet import save_sheet  # noqa: PLC0415  (torch and diffusers: not for --help)
    from smpo_pipeline.inspection.trajectories import draw_shards, load_decoder  # noqa: PLC0415

    with _counting(console, "reading trajectories") as advance:
        summary = summarise_shards(path, limit=limit, samples=4 if samples is None else samples, advance=advance)
    print_shards(summary, path, console)
    if summary.chosen:
        family = load_decoder(summary.manifest, model, vae, "cpu")
        save_sheet(draw_shards(summary.chosen, summary.manifest, family, path), target)
        console.print(f"contact sheet: {target}", highlight=False, soft_wrap=True)


@contextmanager
def _counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that vanishes when done; yields what is to be told (number done, number in all)."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
