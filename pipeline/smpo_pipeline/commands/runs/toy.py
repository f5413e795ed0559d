"""``smpo-pipeline toy``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import Progress

from smpo_common.options import Options
from smpo_pipeline.options import Out
from smpo_pipeline.terminal import print_next


class ToyOptions(Options):
    """The flags of ``toy``."""

    out: Out
    pairs: Annotated[int, Field(ge=1)] = 600
    """Number of preference pairs to sample."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the pairs."""
    family: Literal["sd15", "sd3"] = "sd15"
    """Layout of the base model: sd15, Stable Diffusion 1.5; sd3, Stable Diffusion 3, a flow model."""


def toy(options: ToyOptions) -> None:
    """Write the toy world: a small model of coloured shapes, reward models, and preference pairs of its samples.

    With it you can try `score`, `invert`, `smpo-train` and `evaluate` in minutes on two CPU cores.

    Examples:
        smpo-pipeline toy --out world
    """
    import smpo_models  # noqa: F401, PLC0415  (quiets transformers before it is used)
    from smpo_pipeline.toy.create import create_world  # noqa: PLC0415  (keeps --help free of torch)
    from smpo_pipeline.toy.world import IMAGE_SIZE  # noqa: PLC0415

    console, out = Console(markup=False), options.out
    sizes = f"{options.pairs} pairs at {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    console.print(f"{sizes}; {options.family}; cpu, fp32; seed {options.seed}", highlight=False)
    with Progress(console=console) as progress:
        task = progress.add_task("sampling pairs", total=None)
        create_world(
            out,
            num_pairs=options.pairs,
            seed=options.seed,
            family=options.family,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(f"world of {options.pairs} pairs: {out}", highlight=False, soft_wrap=True)
    pickscore = f"pickscore={out / 'rewards' / 'pickscore'}"
    scores = out.with_name("scores")
    print_next(console, "smpo-pipeline", "score", "--pairs", out / "pairs", "--reward", pickscore, "--out", scores)
