"""``smpo-train``: the command line. Parses, and hands over."""

from __future__ import annotations

from typing import Annotated

import typer

from smpo_common.commandline import VERSION, run_app
from smpo_common.errors import UserError
from smpo_common.options import add_command
from smpo_trainer.presets import as_flags, find_preset
from smpo_trainer.settings import TrainSettings

app = typer.Typer(pretty_exceptions_enable=False)

_EXAMPLES = """Examples:

smpo-train --shards shards --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward pickscore --out runs/smpo

smpo-train --shards shards --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward pickscore:1 clipscore:0.5
--lora-rank 16 --out runs/lora

smpo-train --shards shards --model stabilityai/stable-diffusion-xl-base-1.0 --preset dpo-sdxl --out runs/dpo

accelerate launch --num_processes 8 -m smpo_trainer --shards s3://bucket/shards --model MODEL --out /shared/run
"""


def _list_objectives(wanted: bool) -> None:
    if not wanted:
        return
    # Seconds of torch, which --help saves.
    from smpo_trainer.objectives import find_objective, objectives, offered_objectives  # noqa: PLC0415

    for name in (*sorted(objectives()), *offered_objectives()):
        try:
            objective = find_objective(name)
        except UserError as error:  # one broken package must not hide the others
            typer.echo(f"{name:6} cannot be used: {error}")
            continue
        typer.echo(f"{name:6} {objective.summary}")
        for option in objective.Options.own():
            typer.echo(f"       {option}: {objective.Options.model_fields[option].description}")
    typer.echo("Your own: --objective MODULE:CLASS; see docs/guide/python.md.")
    raise typer.Exit


def _show_preset(name: str | None) -> None:
    if name is None:
        return
    preset = find_preset(name)
    from smpo_trainer.objectives import find_objective  # noqa: PLC0415  (seconds of torch, which --help saves)

    shards = {**find_objective(str(preset.flags["objective"])).published_shards, **preset.shards}
    pairs = f"; {preset.pairs} pairs a step over all devices" if preset.pairs else ""
    typer.echo(f"{name}: published for {preset.kind} models{pairs}")
    typer.echo(f"smpo-train: {as_flags(preset.flags)}")
    typer.echo(f"smpo-pipeline invert: {as_flags(shards)}")
    if preset.starts_from_sft:
        typer.echo("starts from a denoiser that was fine-tuned on the preferred images: --unet, for both commands")
    raise typer.Exit


_ACTIONS = {
    "list_objectives": Annotated[
        bool,
        typer.Option(
            "--list-objectives",
            callback=_list_objectives,
            is_eager=True,
            expose_value=False,
            help="Print every objective with the options that only it has, and exit.",
        ),
    ],
    "show_preset": Annotated[
        str | None,
        typer.Option(
            "--show-preset",
            metavar="NAME",
            callback=_show_preset,
            is_eager=True,
            expose_value=False,
            help="Print a preset's flags, and those its shards were published with, and exit.",
        ),
    ],
    "version": VERSION,
}


def train(settings: TrainSettings) -> None:
    """Align a diffusion model with preference, from shards.

    Run it under `torchrun` or `accelerate launch` for several devices: `torchrun -m smpo_trainer ...`.
    The same command continues a run that was stopped or killed.
    """
    from smpo_trainer.run import run_training  # noqa: PLC0415  (seconds of torch and diffusers, which --help saves)

    run_training(settings)


add_command(app, train, examples=_EXAMPLES, actions=_ACTIONS)


def main() -> None:
    """Entry point of the ``smpo-train`` script."""
    run_app(app)


if __name__ == "__main__":
    main()
