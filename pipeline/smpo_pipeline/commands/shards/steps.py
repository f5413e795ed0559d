"""``smpo-pipeline steps``."""

from __future__ import annotations

from rich.console import Console

from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.jobs.steps.options import StepsOptions
from smpo_pipeline.terminal import print_next
from smpo_schemas.manifest import MANIFEST_FILE


def steps(options: StepsOptions) -> None:
    """Sample prompts and make pairs of the sampler's own steps: two draws of a step, labelled by a reward (TailorPO).

    Writes shards that `smpo-train --objective dpo --timestep-weighting transition` trains on: OUT/shard-*.tar,
    OUT/rejected.parquet and, last, OUT/manifest.json. No images and no scores are needed. A finished run is kept, an
    unfinished one is resumed.

    Examples:
        smpo-pipeline steps --model MODEL --prompts prompts.txt --reward pickscore --out shards
    """
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.steps.job import steps as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    console, models = Console(markup=False), options.models
    if remark := variant_remark(models.model, models.variant):
        console.print(remark, highlight=False, soft_wrap=True)
    manifest = run_job(options)
    options.write(options.out, options.out / MANIFEST_FILE)
    for line in pop_batch_sizes(options.out, options.running.batch_size, "trajectories"):
        console.print(line)
    totals = manifest.totals
    for name, reward in manifest.rewards.items():
        decided = f"{reward.num_labelled} pairs decided, {totals.pairs - reward.num_labelled} ties"
        console.print(
            f"{name} ({reward.unit}): mean {reward.mean:.4g}, std {reward.std:.3g}; {decided}", soft_wrap=True
        )
    rejected = f", {totals.rejected} rejected (reasons: {options.out / 'rejected.parquet'})" if totals.rejected else ""
    size = f"{totals.bytes / 1e6:.1f} MB in {len(manifest.shards)} shards"
    console.print(f"{totals.pairs} pairs, {size}{rejected}: {options.out}", soft_wrap=True)
    optional = {"--unet": models.unet, "--variant": models.variant}
    flags = [word for flag, value in optional.items() if value for word in (flag, value)]
    train = ("smpo-train", "--shards", options.out, "--model", models.model, *flags, "--objective", "dpo")
    print_next(console, *train, "--timestep-weighting", "transition", "--beta", "0.1", "--out", "runs/tailorpo")
