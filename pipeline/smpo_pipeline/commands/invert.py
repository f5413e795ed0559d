"""``smpo-pipeline invert``."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from smpo_common.store_path import AnyPath
from smpo_pipeline.images.buckets import buckets_in_words
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.manifest import MANIFEST_FILE, Manifest


def invert(options: InvertOptions) -> None:
    """Carry every image along the model's own sampling trajectory and store the states as WebDataset shards.

    Writes OUT/shard-*.tar, OUT/rejected.parquet and OUT/manifest.json (written last). `smpo-train --shards OUT` trains
    from them, as often as you like.
    """
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.invert.actor import take_batch_sizes  # noqa: PLC0415
    from smpo_pipeline.jobs.invert.job import invert as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    console, models = Console(markup=False), options.models
    if remark := variant_remark(models.model, models.variant):
        console.print(remark, highlight=False, soft_wrap=True)
    manifest = run_job(options)
    options.write(options.out, options.out / MANIFEST_FILE)
    asked = options.running.batch_size
    for size in take_batch_sizes(options.out):
        why = f"{asked}: larger batches failed, for lack of memory as a rule" if asked else "auto"
        console.print(f"--batch-size {why}: batches of {size} trajectories")
    _show(console, manifest, options.out)
    parts = {"--unet": models.unet, "--variant": models.variant}
    parts_given = [word for flag, part in parts.items() if part for word in (flag, part)]
    train = ("smpo-train", "--shards", options.out, "--model", models.model, *parts_given)
    print_next(console, *train, "--reward", *manifest.rewards, "--out", "runs/smpo")


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
