"""The command line of ``smpo-train``."""

from __future__ import annotations

from typing import Annotated

import typer

from smpo_common.commandline import VERSION, run_app
from smpo_common.errors import UserError
from smpo_common.options import add_command
from smpo_trainer.presets import as_flags, find_preset
from smpo_trainer.settings import TrainSettings

app = typer.Typer(pretty_exceptions_enable=False)


def _list_objectives(wanted: bool) -> None:
    if not wanted:
        return
    # Imported here to keep --help fast: torch takes seconds.
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
        betas = ", ".join(f"{beta:g} ({kind})" for kind, beta in objective.betas.items())
        weighting = objective.timestep_weighting
        bias = f" (bias {objective.sigmoid_bias:g})" if weighting == "sigmoid" else ""
        beta = f"beta {betas}" if betas else "no beta"
        typer.echo(f"       defaults: {beta}; timestep weighting {weighting}{bias}")
    typer.echo("Your own: --objective MODULE:CLASS; see docs/guide/python.md.")
    raise typer.Exit


def _show_preset(name: str | None) -> None:
    if name is None:
        return
    preset = find_preset(name)
    states = f", with {preset.states_per_step} states per step over all devices" if preset.states_per_step else ""
    typer.echo(f"{name}: published for {preset.kind} models{states}")
    typer.echo(f"from: {preset.origin}")
    typer.echo(f"smpo-train: {as_flags(preset.flags)}")
    typer.echo(f"smpo-pipeline invert: {as_flags(preset.shards)}")
    if preset.starts_from_sft:
        typer.echo("give a denoiser that was fine-tuned on the preferred images to both commands with --unet")
    raise typer.Exit


_ACTIONS = {
    "list_objectives": Annotated[
        bool,
        typer.Option(
            "--list-objectives",
            metavar="",
            callback=_list_objectives,
            is_eager=True,
            expose_value=False,
            help="Print every objective with its options and defaults, and exit.",
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
            help="Print the flags that a preset stands for, of smpo-train and of smpo-pipeline invert, and exit.",
        ),
    ],
    "version": VERSION,
}


def train(settings: TrainSettings) -> None:
    """Train a diffusion model on preferences, from shards.

    For several devices run it under `torchrun` or `accelerate launch`: `torchrun -m smpo_trainer ...`.
    Run the same command again to resume a run that was stopped or killed.

    Examples:
        smpo-train --shards shards --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward pickscore --out tuned
        smpo-train --shards shards --model MODEL --reward pickscore:1 clipscore:0.5 --lora-rank 16 --out runs/lora
        smpo-train --shards shards --model stabilityai/stable-diffusion-xl-base-1.0 --preset dpo-sdxl --out runs/dpo
        accelerate launch --num_processes 8 -m smpo_trainer --shards shards --model MODEL --out runs/smpo
    """
    if settings.print_config:
        typer.echo(settings.as_config(), nl=False)
        return
    from smpo_trainer.run import run_training  # noqa: PLC0415  (keeps --help fast: torch takes seconds)

    run_training(settings)


add_command(app, train, actions=_ACTIONS)


def main() -> None:
    """Entry point of the ``smpo-train`` script."""
    run_app(app)


if __name__ == "__main__":
    main()
