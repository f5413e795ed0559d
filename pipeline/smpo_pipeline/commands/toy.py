"""``smpo-pipeline toy``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.progress import Progress

from smpo_pipeline.commands import options as opt


def toy(
    out: opt.OutOption,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Preference pairs to sample.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same pairs.")] = 0,
) -> None:
    """Write the embedded world: a small model of coloured shapes, reward models, and preference pairs of its samples.

    Everything that `score`, `invert`, `smpo-train` and `evaluate` need to be tried out in minutes on two CPU cores.
    """
    import smpo_models  # noqa: F401, PLC0415  (quiets transformers before it is used)
    from smpo_pipeline.toy.create import create_world  # noqa: PLC0415  (keeps --help free of torch)

    with Progress() as progress:
        task = progress.add_task("sampling pairs", total=None)
        create_world(
            out,
            num_pairs=pairs,
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(f"world of {pairs} pairs: {out}")
