"""What ``smpo-train --help`` says of the flags that it shows in groups of their own."""

from __future__ import annotations

from typing import Annotated

import typer

from smpo_trainer.settings import TimestepWeightingKind

_OBJECTIVE = "Objective"


def _list_objectives(wanted: bool) -> None:
    if not wanted:
        return
    from smpo_trainer.objectives import objectives  # noqa: PLC0415  (seconds of torch, which --help saves)

    for name, objective in sorted(objectives().items()):
        typer.echo(f"{name:6} {objective.summary}")
        for option in objective.Options.own():
            typer.echo(f"       {option}: {objective.Options.model_fields[option].description}")
    raise typer.Exit


Objective = Annotated[
    str,
    typer.Option(
        help="Loss: smpo (smoothed preferences of rewards), dpo (labels), ipo, capo, dmpo, mapo, npo or sft; "
        "see --list-objectives.",
        rich_help_panel=_OBJECTIVE,
    ),
]
ListObjectives = Annotated[
    bool,
    typer.Option(
        "--list-objectives",
        callback=_list_objectives,
        is_eager=True,
        expose_value=False,
        help="Print every objective with its own options, and leave.",
        rich_help_panel=_OBJECTIVE,
    ),
]
ObjectiveOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="An option of the objective's own, such as label_smoothing=0.1 of dpo; see --list-objectives.",
        rich_help_panel=_OBJECTIVE,
    ),
]
TimestepWeighting = Annotated[
    TimestepWeightingKind | None,
    typer.Option(
        help="How much a state counts by its timestep: its errors are multiplied by 1, or by weights that fall with "
        "the signal-to-noise ratio (min-snr, sigmoid). Default: as published; sigmoid for capo, uniform for the rest.",
        rich_help_panel=_OBJECTIVE,
    ),
]
SnrGamma = Annotated[
    float,
    typer.Option(
        min=0, help="Of --timestep-weighting min-snr: the SNR from which weights fall.", rich_help_panel=_OBJECTIVE
    ),
]
SigmoidBias = Annotated[
    float,
    typer.Option(
        help="Of --timestep-weighting sigmoid: the log SNR at which the weight is 1/2.", rich_help_panel=_OBJECTIVE
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="How far the preferred image's error may rise above the reference's (times beta/2: in margin units) "
        "before the excess is added to the loss. Default: unlimited.",
        rich_help_panel=_OBJECTIVE,
    ),
]
BudgetWeight = Annotated[
    float, typer.Option(min=0, help="What the excess over --budget is multiplied with.", rich_help_panel=_OBJECTIVE)
]
WeightColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Column with a weight for each pair, in the Parquet files of the table that --scores names. A pair "
        "without one is left out.",
        rich_help_panel=_OBJECTIVE,
    ),
]
