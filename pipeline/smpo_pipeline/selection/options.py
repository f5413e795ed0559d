"""The flags of ``smpo-pipeline select``. Imports neither torch nor Ray."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainSerializer

from smpo_common.named_values import parse_ranges, parse_weights, write_ranges, write_weights
from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.options import FOLDER_OR_URL, ColumnOptions, ExistingPathOrUrl, OutOrUrl
from smpo_pipeline.selection.judges import find_judge, judges
from smpo_pipeline.selection.methods import find_selection, selections


def _named(find: Any, spec: str) -> str:  # noqa: ANN401  (find_selection or find_judge)
    """Check a name early; a user's own class is imported when it is used."""
    if ":" not in spec.partition("=")[0]:
        find(spec)
    return spec


class SelectRewardOptions(Options):
    """How rewards are compared."""

    model_config = ConfigDict(title="Rewards")

    reward: Annotated[
        dict[str, float],
        BeforeValidator(partial(parse_weights, "--reward")),
        PlainSerializer(write_weights),
        Flag(typed=list[str], metavar="NAME[:WEIGHT]"),
    ] = Field(default_factory=dict)
    """Rewards to select by, with weight 1 by default; weights are scaled to sum to 1. Default: those of --calibration,
    else all rewards of the table. Repeatable."""
    calibration: Annotated[Path | None, Flag(metavar="FILE", place=True)] = None
    """Output of `smpo-pipeline calibrate`: each reward's temperature, and its weight if --reward is not given."""
    reward_range: Annotated[
        dict[str, tuple[float, float]],
        BeforeValidator(partial(parse_ranges, "--reward-range")),
        PlainSerializer(write_ranges),
        Flag(typed=list[str], metavar="NAME=MIN:MAX|raw"),
    ] = Field(default_factory=dict)
    """Range of a reward's raw score, in place of the minimum and maximum over the candidates; raw takes scores as they
    are, for those that are log-odds. Give smpo-train the same."""


class SelectOptions(Options):
    """The flags of ``select``."""

    candidates: Annotated[
        tuple[ExistingPathOrUrl, ...],
        Flag(typed=list[str], metavar="PATH|URL", place=True),
        Field(
            description="Candidates: output of `smpo-pipeline generate`, or any scored pairs whose prompts repeat, as "
            "Parquet or JSONL files or folders of them."
        ),
    ]
    scores: Annotated[ExistingPathOrUrl, FOLDER_OR_URL]
    """Output of `smpo-pipeline score` for the candidates."""
    by: Annotated[
        str,
        AfterValidator(partial(_named, find_selection)),
        Flag(metavar="NAME"),
        Field(
            description="How pairs are chosen among the images of a prompt. "
            + " ".join(f"{name}: {method.summary}." for name, method in sorted(selections().items()))
            + " MODULE:CLASS: your own."
        ),
    ]
    out: OutOrUrl
    rewards: SelectRewardOptions = SelectRewardOptions()
    pairs_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Maximum number of pairs per prompt. extremes and ranking use an image once; pareto draws different pairs."""
    min_gap: Annotated[float | None, Field(ge=0, le=1)] = None
    """Smallest gap of a pair: the difference of the mean win rates of its images, for ranking 2 P(chosen over
    rejected) - 1. Default: above 0; for pareto any."""
    dominated_only: bool = False
    """pareto only: keep pairs whose chosen image is at least as good by every reward."""
    loser: Literal["last", "random"] = "last"
    """ranking only: reject the last of the tournament, or a random image."""
    judge: Annotated[
        str,
        AfterValidator(partial(_named, find_judge)),
        Flag(metavar="NAME[=MODEL]"),
        Field(
            description="ranking only: who compares two images, asked in both orders: "
            + "; ".join(f"{name}, {judge.summary}" for name, judge in sorted(judges().items()))
            + "; or your own as MODULE:CLASS."
        ),
    ] = "rewards"
    label: bool = False
    """Label the chosen image as preferred, for objectives that need labels. Default: no label; smpo-train prefers by
    the scores."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all draws: of pairs, of the tournament's order, and of which image becomes image_0."""
    columns: ColumnOptions = ColumnOptions()
    overwrite: Overwrite = False
    """Replace the output of another run. Without it a finished run of the same settings is kept."""
