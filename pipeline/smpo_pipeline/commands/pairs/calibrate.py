"""``smpo-pipeline calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options
from smpo_pipeline.options import FILE, FOLDER, LabelsFile, LocalPath, OutFile
from smpo_pipeline.terminal import print_next
from smpo_schemas.scoring.calibration import CALIBRATION_FILE, write_calibration
from smpo_schemas.scoring.scores import SCORES_FILE


class CalibrateOptions(Options):
    """The flags of ``calibrate``."""

    scores: Annotated[LocalPath, FOLDER]
    """Output directory of `smpo-pipeline score` for pairs with labels."""
    out: Annotated[
        OutFile | None,
        FILE,
        Field(description=f"File to write, ending in .json; default: {CALIBRATION_FILE} in the scores' folder."),
    ] = None
    labels: LabelsFile = None
    reward: Annotated[tuple[str, ...], Flag(metavar="NAME")] = ()
    """Rewards to calibrate; default: all. Repeatable."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds for cross-validation, split by prompt."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split into folds."""

    @property
    def target(self) -> Path:
        """The file to write.

        Raises:
            UserError: it would overwrite the scores or be overwritten by the picture.
        """
        target = self.out or self.scores / CALIBRATION_FILE
        if target.suffix != ".json" or target.name == SCORES_FILE:
            raise UserError(f"--out {target}: expected a file that ends in .json, but not {SCORES_FILE}")
        return target


def calibrate(options: CalibrateOptions) -> None:
    """Fit the temperature of each reward, and its share in a mixture, to human labels; report held-out agreement.

    Writes the file for `smpo-train --preference mixture --calibration FILE`, and a plot beside it (.png).

    Examples:
        smpo-pipeline calibrate --scores scores
    """
    target = options.target
    from smpo_pipeline.calibration import calibrate as job  # noqa: PLC0415  (keeps --help free of torch)
    from smpo_pipeline.calibration.plot import save_plot  # noqa: PLC0415
    from smpo_pipeline.calibration.show import print_report  # noqa: PLC0415

    console, scores, folds = Console(markup=False, emoji=False), options.scores, options.folds  # prints text from files
    rewards = ", ".join(options.reward) or "all of them"
    console.print(f"rewards: {rewards}; {folds} folds of the prompts; seed {options.seed}", highlight=False)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fitting", total=folds + 1)
        report = job.calibrate(
            scores,
            options.reward,
            folds=folds,
            seed=options.seed,
            labels=options.labels,
            done=lambda count: progress.update(task, completed=count),
        )
    write_calibration(target, report.calibration)
    save_plot(report, target.with_suffix(".png"))
    print_report(report, str(scores), console)
    console.print(f"{target} and {target.with_suffix('.png').name}", highlight=False, soft_wrap=True)
    train = ("smpo-train", "--shards", "SHARDS", "--model", "MODEL", "--preference", "mixture")
    print_next(console, *train, "--calibration", target, "--out", "runs/mixture")
