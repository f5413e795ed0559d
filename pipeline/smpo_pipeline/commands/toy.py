"""``smpo-pipeline toy``."""

from __future__ import annotations

from typing import Annotated

import typer

from smpo_pipeline.commands import options as opt


def toy(
    out: opt.OutOption,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Preference pairs to sample.")] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same pairs.")] = 0,
) -> None:
    """Write the embedded world: a small model of coloured shapes, reward models, and preference pairs of its samples.

    Everything that `score`, `invert`, `smpo-train` and `evaluate` need to be tried out in minutes on two CPU cores.
    """
    from smpo_pipeline.toy.create import create_world  # noqa: PLC0415  (keeps --help free of torch)

    create_world(out, num_pairs=pairs, seed=seed)
