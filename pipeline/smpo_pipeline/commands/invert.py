"""``smpo-pipeline invert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from smpo_common.commandline import ConfigOption, write_resolved_config
from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath, parse_path
from smpo_pipeline.commands import options as opt
from smpo_pipeline.images.buckets import buckets_in_words
from smpo_schemas.inversion_settings import InversionSettings, averaged_estimates
from smpo_schemas.manifest import MANIFEST_FILE, Manifest

_MODEL = "Model"
_TRAJECTORY = "Trajectories"
_DEFAULTS = InversionSettings()
_TOLERANCE = {"fp32": _DEFAULTS.tolerance, "fp16": 3e-4, "bf16": 2e-3}
"""A few times the rounding of the denoiser's output, below which no residual falls (docs/inversion.md)."""

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9}

_SOLVERS_OF_FLAG = {
    "solver": ("ddim", "renoise", "adaptive", "anderson"),
    "renoise_steps": ("renoise",),
    "renoise_average": ("renoise",),
    "tolerance": ("adaptive", "anderson"),
    "max_evaluations": ("adaptive", "anderson"),
    "anderson_depth": ("anderson",),
}
_FLAGS_OF_TRAJECTORIES = ("start", "eta", "guidance_scale", "inverting_unet")
"""Flags that no state of ``--source forward`` depends on, besides those of the solvers."""


def invert(
    context: typer.Context,
    pairs: opt.PairsOption,
    scores: Annotated[
        str,
        typer.Option(
            "--scores",
            metavar="DIR|URL",
            callback=opt.existing("--scores"),
            help="Output of `smpo-pipeline score` for these pairs.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            callback=opt.model_source("--model"),
            help="Text-to-image model to align: hub id or diffusers folder.",
        ),
    ],
    out: opt.OutOrUrlOption,
    unet: Annotated[
        Path | None,
        typer.Option(
            callback=opt.existing("--unet"),
            help="The reference, where it is not the model's own denoiser.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    inverting_unet: Annotated[
        Path | None,
        typer.Option(
            callback=opt.existing("--inverting-unet"),
            help="Denoiser that carries the images along, for a second round: a folder, or a LoRA of smpo-train on top "
            "of the reference; default: the reference.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            callback=opt.model_source("--vae"),
            help="VAE in place of the model's own: hub id or folder.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    variant: opt.VariantOption = None,
    resolution: Annotated[
        int | None,
        typer.Option(min=8, help="Side of the square images in pixels; default: the model's.", rich_help_panel=_MODEL),
    ] = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets/--no-buckets",
            help="Bring each pair to one of several sizes of about that area, by its aspect ratio, not to the square.",
            rich_help_panel=_MODEL,
        ),
    ] = _DEFAULTS.buckets,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"] | None,
        typer.Option(help="Of the denoiser's forwards; default: bf16 on cuda, fp32 on cpu.", rich_help_panel=_MODEL),
    ] = None,
    source: Annotated[
        Literal["renoise", "forward"],
        typer.Option(
            help="renoise: the model's own trajectory; forward: Gaussian noise (Diffusion-DPO's estimate).",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "renoise",
    forward_noise: Annotated[
        Literal["pair", "image"],
        typer.Option(
            help="Of --source forward: one noise for both images of a pair, or one an image (CaPO).",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "pair",
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of a trajectory, and so its states.", rich_help_panel=_TRAJECTORY)
    ] = _DEFAULTS.steps,
    solver: Annotated[
        Literal["ddim", "renoise", "adaptive", "anderson"],
        typer.Option(
            help="Of a step: none (ddim), iterations by number (renoise), or until converged (adaptive, anderson).",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "renoise",
    renoise_steps: Annotated[
        int,
        typer.Option(
            min=0, help="ReNoise iterations a step, one forward each; 0: DDIM inversion.", rich_help_panel=_TRAJECTORY
        ),
    ] = _DEFAULTS.renoise_steps,
    renoise_average: Annotated[
        str,
        typer.Option(
            help="ReNoise estimates that are averaged: lastN, all, or their numbers (0,1).", rich_help_panel=_TRAJECTORY
        ),
    ] = _DEFAULTS.renoise_average,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            help="Of adaptive and anderson: the residual (relative) at which an image's step is done; "
            "default: 1e-4 in fp32, 3e-4 in fp16, 2e-3 in bf16.",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = None,
    max_evaluations: Annotated[
        int,
        typer.Option(
            min=1,
            help="Of adaptive and anderson: forwards after which a step ends as it is.",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = _DEFAULTS.max_evaluations,
    anderson_depth: Annotated[
        int,
        typer.Option(min=1, max=8, help="Of anderson: differences that it looks back on.", rich_help_panel=_TRAJECTORY),
    ] = _DEFAULTS.anderson_depth,
    start: Annotated[
        str,
        typer.Option(
            help="clean: from x0; level0: from x0 noised to the first level; a timestep T: nodes up to T by noising.",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = str(_DEFAULTS.start),
    timesteps: Annotated[
        Literal["jittered", "grid", "published"],
        typer.Option(
            help="jittered: one uniform draw a stratum; grid: the scheduler's; published: as the published code, "
            "a grid state at or above a uniform t, used as if at t.",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "jittered",
    eta: Annotated[
        float,
        typer.Option(
            min=0, help="Noise after each step, in DDIM posterior std (DDIM-InPO: 0.1).", rich_help_panel=_TRAJECTORY
        ),
    ] = _DEFAULTS.eta,
    guidance_scale: Annotated[
        float, typer.Option(min=0, help="Guidance of the inverting denoiser; 1: none.", rich_help_panel=_TRAJECTORY)
    ] = _DEFAULTS.guidance_scale,
    states: Annotated[
        str,
        typer.Option(help="States stored a trajectory: all, or a number drawn from them.", rich_help_panel=_TRAJECTORY),
    ] = "all",
    trajectories: Annotated[
        int, typer.Option(min=1, help="Trajectories a pair, each with draws of its own.", rich_help_panel=_TRAJECTORY)
    ] = _DEFAULTS.trajectories,
    vae_latent: Annotated[
        Literal["sample", "mode"],
        typer.Option(help="sample or mode of the VAE's posterior.", rich_help_panel=_TRAJECTORY),
    ] = "sample",
    prompt_dropout: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of trajectories under the empty prompt.", rich_help_panel=_TRAJECTORY),
    ] = _DEFAULTS.prompt_dropout,
    hflip: Annotated[
        bool, typer.Option("--hflip/--no-hflip", help="Mirror half of the trajectories.", rich_help_panel=_TRAJECTORY)
    ] = _DEFAULTS.hflip,
    storage: Annotated[
        Literal["float16", "bfloat16"],
        typer.Option(
            help="Of stored latents and noise: float16 (11 bits of each value, up to 65504) or bfloat16 (8, any size).",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "float16",
    size_conditioning: Annotated[
        Literal["image", "constant"],
        typer.Option(
            help="What SDXL is told: each image's own size and crop, or the resolution and no crop (published code).",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "image",
    empty_prompt: Annotated[
        Literal["model", "encoded"],
        typer.Option(
            help="What a dropped prompt is. model: what the model's own pipeline guides with, zeros for SDXL. encoded: "
            "what the text encoders make of an empty text (published code). The trainer does as the shards say.",
            rich_help_panel=_TRAJECTORY,
        ),
    ] = "model",
    seed: Annotated[int, typer.Option(min=0, help="With the pair's id, the source of all randomness.")] = 0,
    pairs_per_shard: Annotated[int, typer.Option(min=1, help="Pairs a tar, and a unit of work.")] = 128,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Size of a tar in place of --pairs-per-shard: 500MB, 1GB (about)."),
    ] = None,
    prompt_column: opt.PromptColumn = None,
    image_0_column: opt.Image0Column = None,
    image_1_column: opt.Image1Column = None,
    label_column: opt.LabelColumn = None,
    pair_id_column: opt.PairIdColumn = None,
    annotator_column: opt.AnnotatorColumn = None,
    batch_size: opt.AutoBatchSizeOption = "16",
    device: opt.DeviceOption = None,
    concurrency: opt.ConcurrencyOption = None,
    ray_address: opt.RayAddressOption = None,
    limit: opt.LimitOption = None,
    max_reject_rate: opt.MaxRejectRateOption = 0.05,
    overwrite: opt.OverwriteOption = False,
    config: ConfigOption = None,  # noqa: ARG001  (read by its callback)
) -> None:
    """Carry every image along the model's own sampling trajectory and store the states as WebDataset shards.

    Writes OUT/shard-*.tar, OUT/rejected.parquet and OUT/manifest.json (written last). `smpo-train --shards OUT` trains
    from them, as often as you like.
    """
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.invert.actor import InvertOptions, take_batch_sizes  # noqa: PLC0415
    from smpo_pipeline.jobs.invert.job import invert  # noqa: PLC0415
    from smpo_pipeline.jobs.ray.session import check_device  # noqa: PLC0415  (keeps --help free of torch and Ray)

    directory = parse_path(out)
    checked = check_device(device, ray_address)
    settings = inversion_settings(
        context,
        checked,
        source=source,
        forward_noise=forward_noise,
        start=start,
        timesteps=timesteps,
        steps=steps,
        solver=solver,
        renoise_steps=renoise_steps,
        renoise_average=renoise_average,
        tolerance=tolerance,
        max_evaluations=max_evaluations,
        anderson_depth=anderson_depth,
        eta=eta,
        guidance_scale=guidance_scale,
        states=states,
        trajectories=trajectories,
        vae_latent=vae_latent,
        prompt_dropout=prompt_dropout,
        hflip=hflip,
        size_conditioning=size_conditioning,
        empty_prompt=empty_prompt,
        storage=storage,
        buckets=buckets,
        dtype=dtype,
    )
    columns = opt.columns_by_field(
        prompt_column, image_0_column, image_1_column, label_column, pair_id_column, annotator_column
    )
    console = Console(markup=False)
    if remark := variant_remark(model, variant):
        console.print(remark, highlight=False, soft_wrap=True)
    manifest = invert(
        InvertOptions(
            pairs=[parse_path(path) for path in pairs],
            scores=parse_path(scores),
            model=model,
            out=directory,
            unet=unet,
            inverting_unet=inverting_unet,
            vae=vae,
            variant=variant,
            resolution=resolution,
            settings=settings,
            columns=columns,
            seed=seed,
            pairs_per_shard=pairs_per_shard,
            shard_bytes=parse_shard_size(context, shard_size),
            batch_size=opt.parse_batch_size(batch_size),
            device=checked,
            concurrency=concurrency,
            ray_address=ray_address,
            limit=limit,
            max_reject_rate=max_reject_rate,
            overwrite=overwrite,
        )
    )
    write_resolved_config(context, directory, directory / MANIFEST_FILE)
    for size in take_batch_sizes(directory):
        why = "auto" if batch_size == "auto" else f"{batch_size}: larger batches failed, for lack of memory as a rule"
        console.print(f"--batch-size {why}: batches of {size} trajectories")
    _show(console, manifest, directory)


SETTINGS_FLAGS = tuple(InversionSettings.model_fields)
"""The flags of which :class:`InversionSettings` are made have its fields' names."""


def inversion_settings(context: typer.Context, device: str, **flags: Any) -> InversionSettings:  # noqa: ANN401
    """Check the flags named in :data:`SETTINGS_FLAGS`, and fill in the defaults that depend on others.

    Raises:
        UserError: a flag has no meaning, or none beside the others.
    """
    _check_unused_flags(context, flags["solver"] if flags["source"] == "renoise" else None)
    averaged_estimates(flags["renoise_average"], flags["renoise_steps"])
    precision = flags["dtype"] or ("bf16" if device == "cuda" else "fp32")
    derived = {
        "start": _start(flags["start"]),
        "states": _states(flags["states"]),
        "tolerance": flags["tolerance"] or _TOLERANCE[precision],
        "dtype": precision,
    }
    return InversionSettings(**{**flags, **derived})


def _check_unused_flags(context: typer.Context, solver: str | None) -> None:
    """Refuse flags on the command line that this solver, or a run without trajectories (None), does not look at."""
    for name, solvers in _SOLVERS_OF_FLAG.items():
        if _given(context, name) and solver not in solvers:
            used = "--source forward makes no trajectory" if solver is None else f"--solver {solver} does not use it"
            raise UserError(f"{_flag(name)}: {used}; it is for --solver {' and '.join(solvers)}")
    for name in _FLAGS_OF_TRAJECTORIES:
        if _given(context, name) and solver is None:
            raise UserError(f"{_flag(name)}: --source forward makes no trajectory; it is for --source renoise")
    if _given(context, "forward_noise") and solver is not None:
        raise UserError("--forward-noise: --source renoise makes trajectories; it is for --source forward")


def _given(context: typer.Context, name: str) -> bool:
    """Whether the flag stands on the command line itself."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_shard_size(context: typer.Context, value: str | None) -> int | None:
    """Bytes of a tar, or None where ``--shard-size`` is not given.

    Raises:
        UserError: it is no size, or stands beside ``--pairs-per-shard``.
    """
    if value is None:
        return None
    if _given(context, "pairs_per_shard"):
        raise UserError(f"--shard-size {value} and --pairs-per-shard both say how large a tar is; give one of them")
    number, unit = value[:-2], value[-2:]
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--shard-size {value}: a whole number with {', '.join(_UNITS)}, as in 500MB")
    return int(number) * _UNITS[unit]


def _start(value: str) -> Literal["clean", "level0"] | int:
    if value == "clean":
        return "clean"
    if value == "level0":
        return "level0"
    if value.isdigit():
        return int(value)
    raise UserError(f"--start {value}: clean, level0, or a timestep")


def _states(value: str) -> int | None:
    if value == "all":
        return None
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise UserError(f"--states {value}: all, or a number from 1")


def _show(console: Console, manifest: Manifest, out: AnyPath) -> None:
    from smpo_pipeline.inversion.advice import health_warnings  # noqa: PLC0415

    totals = manifest.totals
    ratios = [f"{band.noise_ratio:.2f}" for band in manifest.health if band.noise_ratio is not None]
    console.print(f"noise ratio by timestep band (exact inversion: 1): {' '.join(ratios)}")
    for warning in health_warnings(manifest.health, manifest.inversion):
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    if totals.prompts_cut:
        console.print(
            f"{totals.prompts_cut} prompts are longer than the text encoder takes: their ends were cut, as the model's "
            "own pipeline does"
        )
    if manifest.buckets:
        console.print(f"image sizes, height x width: {buckets_in_words(manifest.buckets)}")
    rejected = f", {totals.rejected} rejected (reasons: {out / 'rejected.parquet'})" if totals.rejected else ""
    size = f"{totals.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    console.print(f"{totals.pairs} pairs, {totals.states} states, {size}{rejected}: {out}")
