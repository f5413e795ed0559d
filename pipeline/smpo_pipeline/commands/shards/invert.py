"""``smpo-pipeline invert``."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from smpo_common.store_path import AnyPath
from smpo_pipeline.images.buckets import describe_buckets
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.terminal import print_next
from smpo_schemas.manifest import MANIFEST_FILE, Manifest


def invert(options: InvertOptions) -> None:
    """Invert the images of every pair along the model's sampling trajectory, and store the states as WebDataset shards.

    Or take states without inversion, by --source.

    Writes OUT/shard-*.tar, OUT/rejected.parquet and, last, OUT/manifest.json. Train on them with
    `smpo-train --shards OUT`, as often as you like.

    Examples:
        smpo-pipeline invert --pairs data --scores scores --model stabilityai/stable-diffusion-3.5-medium --out shards
    """
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.invert.job import invert as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    console, models = Console(markup=False), options.models
    if remark := variant_remark(models.model, models.variant):
        console.print(remark, highlight=False, soft_wrap=True)
    manifest = run_job(options)
    options.write(options.out, options.out / MANIFEST_FILE)
    for line in pop_batch_sizes(options.out, options.running.batch_size, "trajectories"):
        console.print(line)
    _show(console, manifest, options.out)
    optional = {"--unet": models.unet, "--variant": models.variant}
    flags = [word for flag, value in optional.items() if value for word in (flag, value)]
    train = ("smpo-train", "--shards", options.out, "--model", models.model, *flags)
    if manifest.inversion.source == "truncated":
        print_next(console, *train, "--objective", "selfnpo", "--out", "runs/selfnpo")
    elif manifest.rewards:
        print_next(console, *train, "--reward", *manifest.rewards, "--out", "runs/smpo")
    else:
        print_next(console, *train, "--objective", "dpo", "--out", "runs/dpo")


def _show(console: Console, manifest: Manifest, out: AnyPath) -> None:
    from smpo_pipeline.inversion.advice import health_warnings, sampling_remarks  # noqa: PLC0415

    totals = manifest.totals
    ratios = [f"{band.noise_ratio:.2f}" for band in manifest.health if band.noise_ratio is not None]
    console.print(f"noise ratio by timestep band (exact inversion: 1): {' '.join(ratios)}")
    for remark in sampling_remarks(manifest):
        console.print(f"remark: {remark}", highlight=False, soft_wrap=True)
    for warning in health_warnings(manifest.health, manifest.inversion):
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
    if totals.prompts_cut:
        console.print(
            f"{totals.prompts_cut} prompts are longer than the text encoder accepts and were truncated, as by the "
            "model's pipeline"
        )
    if manifest.buckets:
        console.print(f"image sizes, height x width: {describe_buckets(manifest.buckets)}")
    rejected = f", {totals.rejected} rejected (reasons: {out / 'rejected.parquet'})" if totals.rejected else ""
    size = f"{totals.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    console.print(f"{totals.pairs} pairs, {totals.states} states, {size}{rejected}: {out}")
