"""``smpo-pipeline merge``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from rich.console import Console

from smpo_common.errors import UserError
from smpo_common.files import write_json
from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.options import ExistingPath, ModelSource, Out, Variant
from smpo_pipeline.terminal import print_next
from smpo_schemas.trained_model import DENOISER_FOLDERS, MERGED_FILE

if TYPE_CHECKING:
    from torch import nn


class MergeOptions(Options):
    """The flags of ``merge``."""

    model: Annotated[ModelSource, Flag(place=True)]
    """Text-to-image model that both were trained from: hub id or diffusers folder."""
    positive: ExistingPath
    """Output of smpo-train, or a LoRA file, that generation is to be guided towards."""
    out: Out
    negative: ExistingPath | None = None
    """Output of smpo-train --objective npo, or a LoRA file. Without it the result is the positive model alone; for a
    LoRA, the denoiser with the LoRA merged into it."""
    unet: ExistingPath | None = None
    """Denoiser folder that both were trained from, if it is not the model's own."""
    alpha: float = 1.0
    """Weight of the positive model's difference from --model."""
    beta: float = 1.0
    """Weight of the negative model's difference from --model."""
    variant: Variant = None
    overwrite: Overwrite = False
    """Replace the denoiser in --out."""


def merge(options: MergeOptions) -> None:
    """Merge two tuned denoisers into the negative model of Diffusion-NPO (arXiv 2505.11245), or a LoRA into its model.

    The weights are model + alpha (positive - model) + beta (negative - model), in float32. Guide with a negative model
    by `smpo-pipeline evaluate --negative NAME=OUT`; pass any other result to `--unet` of generate, invert and
    smpo-train.

    Examples:
        smpo-pipeline merge --model MODEL --positive runs/smpo --negative runs/npo --out negative
    """
    _check_out(options)
    from smpo_models.fingerprint import fingerprint_module  # noqa: PLC0415  (keeps --help free of torch)
    from smpo_models.loading import load_family, load_tuned_denoiser  # noqa: PLC0415
    from smpo_models.tuned.merge import merge_into  # noqa: PLC0415

    family = load_family(options.model, ("denoiser",), denoiser=options.unet, variant=options.variant)
    sources = {"--positive": (options.positive, options.alpha)}
    if options.negative:
        sources["--negative"] = (options.negative, options.beta)
    tuned = {}
    for flag, (path, weight) in sources.items():
        what = f"{flag} {path}"
        tuned[what] = load_tuned_denoiser(family, options.model, path, what, options.variant), weight
    merged = cast("nn.Module", family.denoiser)
    merge_into(merged, tuned)
    (options.out / MERGED_FILE).unlink(missing_ok=True)
    _save(merged, options.out / family.denoiser_folder)
    options.write(options.out)
    settings = {name: str(value) for name, value in options.flat_values().items() if name not in ("out", "overwrite")}
    write_json(options.out / MERGED_FILE, {"settings": settings, "fingerprint": fingerprint_module(merged)})
    console = Console(markup=False)
    console.print(f"merged into {options.out / family.denoiser_folder}", highlight=False, soft_wrap=True)
    tuned_model = options.positive if options.negative else options.out
    models = ("--model", f"base={options.model}", f"tuned={tuned_model}")
    negative = ("--negative", f"tuned={options.out}") if options.negative else ()
    common = ("--prompts", "PROMPTS", "--reward", "pickscore", "--out", "report")
    print_next(console, "smpo-pipeline", "evaluate", *models, *negative, *common)


def _check_out(options: MergeOptions) -> None:
    """Refuse to replace an input, and anything else without ``--overwrite``."""
    for path in (options.model, options.positive, options.negative, options.unet):
        if path and Path(path).resolve() == options.out.resolve():
            raise UserError(f"--out {options.out} is also an input; choose another --out")
    for name in (MERGED_FILE, *DENOISER_FOLDERS):
        if (options.out / name).exists() and not options.overwrite:
            raise UserError(f"--out {options.out} holds {name}; choose another --out, or replace it with --overwrite")


def _save(denoiser: Any, folder: Path) -> None:  # noqa: ANN401  (diffusers' mixin has no type)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        denoiser.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"--out: cannot write {folder}: {error.strerror or error}") from error
