"""``smpo-pipeline calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from smpo_common.errors import UserError
from smpo_pipeline.commands.options import local_path, writable
from smpo_schemas.calibration import CALIBRATION_FILE, write_calibration
from smpo_schemas.scores import SCORES_FILE


def calibrate(
    scores: Annotated[
        Path,
        typer.Option(metavar="DIR", parser=local_path, help="Output of `smpo-pipeline score`, of pairs with labels."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=local_path,
            callback=writable("--out", file=True),
            help=f"What to write, .json; default: {CALIBRATION_FILE} in the scores' folder.",
        ),
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these rewards; default: all. Repeatable.")
    ] = None,
    folds: Annotated[
        int, typer.Option(min=2, help="Parts of the prompts; each is held out once, and judged by a fit to the others.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Deals the prompts to the folds.")] = 0,
) -> None:
    """Fit each reward's temperature, and its share in a mixture, to people's labels; say how well each mix does.

    Writes the calibration that `smpo-train --preference mixture --calibration FILE` takes, and a picture beside it
    (the same name, .png).
    """
    from smpo_pipeline.calibration import calibrate as job  # noqa: PLC0415  (keeps --help free of torch)
    from smpo_pipeline.calibration.plot import save_plot  # noqa: PLC0415
    from smpo_pipeline.calibration.show import print_report  # noqa: PLC0415

    target = out or scores / CALIBRATION_FILE
    if target.suffix != ".json" or target.name == SCORES_FILE:
        raise UserError(f"--out {target}: name a file that ends in .json (the picture ends in .png), not {SCORES_FILE}")
    console = Console(markup=False, emoji=False)  # what is printed comes from the files
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fitting", total=folds + 1)
        report = job.calibrate(
            scores, reward or [], folds=folds, seed=seed, done=lambda count: progress.update(task, completed=count)
        )
    write_calibration(target, report.calibration)
    save_plot(report, target.with_suffix(".png"))
    print_report(report, str(scores), console)
    console.print(f"{target} and {target.with_suffix('.png').name}", highlight=False, soft_wrap=True)
