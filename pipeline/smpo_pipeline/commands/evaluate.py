"""``smpo-pipeline evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from smpo_common.commandline import ConfigOption, write_resolved_config
from smpo_pipeline.commands.options import DeviceOption, OutOption, RewardsOption, VariantOption, local_path
from smpo_pipeline.evaluation.plan import finished_results, make_plan
from smpo_pipeline.evaluation.results import REPORT_FILE
from smpo_pipeline.evaluation.summary import print_results


def evaluate(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=DIR",
            help="A model to compare: a diffusers pipeline (folder or hub id) or an output of smpo-train. "
            "The first one is the baseline. Repeatable.",
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            parser=local_path,
            help="Prompts: .txt with one a line, or .jsonl or .parquet with a column prompt or caption.",
        ),
    ],
    reward: RewardsOption,
    out: OutOption,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The whole model that completes outputs of smpo-train. Default: the first --model that is whole.",
        ),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Images of each prompt, each from its own noise.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps of an image.")] = 50,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Classifier-free guidance; 1 is none.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Of the initial noise, which is the same for all models.")] = 0,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Number type of the models.")] = "fp32",
    resolution: Annotated[
        int | None,
        typer.Option(min=8, metavar="PIXELS", help="Side of the images. Default: what the models were made for."),
    ] = None,
    variant: VariantOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images made, and scored, at once.")] = 8,
    device: DeviceOption = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Evaluate anew, whatever is there; images made with the very same settings are kept.",
        ),
    ] = False,
    config: ConfigOption = None,  # noqa: ARG001  (read by its callback)
) -> None:
    """Compare models: the same prompts and noise for all, scores, win rates with intervals, a report with pictures.

    A finished evaluation with the same settings is left alone, an unfinished one is continued.
    """
    console = Console(markup=False)
    plan = make_plan(
        out,
        model,
        base,
        prompts,
        reward,
        limit=limit,
        images_per_prompt=images_per_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        dtype=dtype,
        resolution=resolution,
        variant=variant,
        batch_size=batch_size,
        device=device,
    )
    results = finished_results(plan, overwrite=overwrite)
    if results:
        console.print(f"{out} is finished with these settings; nothing to do.", highlight=False, soft_wrap=True)
    else:
        from smpo_pipeline.evaluation.run import run  # noqa: PLC0415  (loads torch: not for a finished evaluation)

        write_resolved_config(context, out)
        results = run(plan, console)
    print_results(results, console)
    console.print(f"report: {out / REPORT_FILE}", highlight=False, soft_wrap=True)
