"""``smpo-pipeline score``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from smpo_common.commandline import ConfigOption, write_resolved_config
from smpo_common.store_path import AnyPath, parse_path
from smpo_pipeline.commands import options as opt
from smpo_schemas.scores import REJECTS_FILE, SCORES_FILE, ScoresInfo


def score(
    context: typer.Context,
    pairs: opt.PairsOption,
    reward: opt.RewardsOption,
    out: opt.OutOrUrlOption,
    prompt_column: opt.PromptColumn = None,
    image_0_column: opt.Image0Column = None,
    image_1_column: opt.Image1Column = None,
    label_column: opt.LabelColumn = None,
    pair_id_column: opt.PairIdColumn = None,
    annotator_column: opt.AnnotatorColumn = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images a model call; default: each reward's own.", rich_help_panel=opt.RUNNING),
    ] = None,
    device: opt.DeviceOption = None,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"],
        typer.Option(
            help="Of the reward models' matrix products. Half precision is faster on a GPU and rounds scores.",
            rich_help_panel=opt.RUNNING,
        ),
    ] = "fp32",
    concurrency: Annotated[
        list[str] | None,
        typer.Option(
            help="Actors of each reward: N, or NAME=N for one of them, repeatable. Default: one a GPU, or what keeps "
            "all cores busy.",
            rich_help_panel=opt.RUNNING,
        ),
    ] = None,
    ray_address: opt.RayAddressOption = None,
    limit: opt.LimitOption = None,
    max_reject_rate: opt.MaxRejectRateOption = 0.05,
    overwrite: opt.OverwriteOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read by its callback)
) -> None:
    """Score both images of every pair with one or more reward models.

    Into a finished OUT of the same pairs, rewards that it lacks are added: what is there is not scored again.

    Writes OUT/scores-*.parquet (one row a pair, raw scores), OUT/rejected.parquet (pairs left out, with the reason)
    and OUT/scores.json (statistics; written last).
    """
    from smpo_pipeline.jobs.ray.session import check_device  # noqa: PLC0415  (keeps --help free of torch and Ray)
    from smpo_pipeline.jobs.score.job import ScoreOptions, score  # noqa: PLC0415

    columns = opt.columns_by_field(
        prompt_column, image_0_column, image_1_column, label_column, pair_id_column, annotator_column
    )
    directory = parse_path(out)
    info = score(
        ScoreOptions(
            pairs=[parse_path(path) for path in pairs],
            out=directory,
            reward=reward,
            columns=columns,
            batch_size=batch_size,
            device=check_device(device, ray_address),
            dtype=dtype,
            concurrency=concurrency or [],
            ray_address=ray_address,
            limit=limit,
            max_reject_rate=max_reject_rate,
            overwrite=overwrite,
        )
    )
    write_resolved_config(context, directory, directory / SCORES_FILE)
    _show(Console(markup=False), info, directory)


def _show(console: Console, info: ScoresInfo, out: AnyPath) -> None:
    table = Table("reward", "unit", "min", "mean", "max", "agrees with labels")
    for name, each in info.rewards.items():
        agreement = "no labels" if each.agreement is None else f"{each.agreement:.1%} of {each.num_labelled}"
        table.add_row(name, each.unit, f"{each.min:.4f}", f"{each.mean:.4f}", f"{each.max:.4f}", agreement)
    console.print(table)
    rejected = f", {info.rejected} rejected (reasons: {out / REJECTS_FILE})" if info.rejected else ""
    console.print(f"{info.scored} pairs scored{rejected}: {out}")
