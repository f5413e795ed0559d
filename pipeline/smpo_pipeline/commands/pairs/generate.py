"""``smpo-pipeline generate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from smpo_common.files import write_json
from smpo_pipeline.jobs.generate.options import GenerateOptions
from smpo_pipeline.jobs.record.batch_sizes import pop_batch_sizes
from smpo_pipeline.terminal import format_bytes, print_next
from smpo_schemas.generation.candidates import CANDIDATES_FILE
from smpo_schemas.rejects import REJECTS_FILE

if TYPE_CHECKING:
    from smpo_pipeline.planning.generation import GenerationPlan


def generate(options: GenerateOptions) -> None:
    """Generate several candidate images of every prompt, as pairs that `score` reads.

    Writes OUT/candidates-*.parquet (two images per row), OUT/rejected.parquet (prompts without images, with reasons)
    and, last, OUT/candidates.json. A finished run is kept, an unfinished one is resumed. With --plan nothing is stored.

    Examples:
        smpo-pipeline generate --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt --out candidates
    """
    if options.planning.plan:
        _plan(options)
        return
    from smpo_models.weights import variant_remark  # noqa: PLC0415
    from smpo_pipeline.jobs.generate.job import generate as run_job  # noqa: PLC0415  (keeps --help free of torch and Ray)

    console = Console(markup=False)
    if remark := variant_remark(options.model, options.sampling.variant):
        console.print(remark, highlight=False, soft_wrap=True)
    made = run_job(options)
    options.write(options.out, options.out / CANDIDATES_FILE)
    for line in pop_batch_sizes(options.out, options.running.batch_size, "images"):
        console.print(line)
    rejected = f", {made.rejected} rejected (reasons: {options.out / REJECTS_FILE})" if made.rejected else ""
    size = f"{sum(part.bytes for part in made.parts) / 1e6:.1f} MB in {len(made.parts)} files"
    console.print(f"{made.prompts} prompts, {made.images} images, {size}{rejected}: {options.out}", soft_wrap=True)
    print_next(console, "smpo-pipeline", "score", "--pairs", options.out, "--reward", "REWARD", "--out", "scores")


def _plan(options: GenerateOptions) -> None:
    from smpo_pipeline.jobs.cluster.session import resolve_device, set_reproducible_arithmetic  # noqa: PLC0415  (keeps --help free of torch and Ray)
    from smpo_pipeline.planning.generation import plan_generation  # noqa: PLC0415

    device = resolve_device(options.running.device)
    set_reproducible_arithmetic(device)
    console = Console(markup=False)
    plan = plan_generation(options.replace(device=device), console)
    _show_plan(console, plan)
    if options.planning.json_:
        write_json(options.planning.json_, plan.model_dump())


def _show_plan(console: Console, plan: GenerationPlan) -> None:
    hours = "GPU hours" if plan.peak_memory is not None else "CPU hours"
    table = Table(title=f"generate on {plan.device}, batches of {plan.batch_size} images")
    for column in ("prompts", "images", hours, f"wall hours on {plan.gpus}", "size", "files", "dollars"):
        table.add_column(column, justify="right", overflow="fold")
    for each in plan.projections:
        table.add_row(
            f"{each.prompts:,}",
            f"{each.images:,}",
            f"{each.device_hours:,.3g}",
            f"{each.wall_hours:,.3g}",
            format_bytes(each.bytes),
            f"{each.files:,}",
            "-" if each.dollars is None else f"{each.dollars:,.2f}",
        )
    console.print(table)
    measured = f"measured over {plan.measured_images} images in {plan.measured_seconds:.1f} s"
    lines = [
        f"{plan.images_per_second:.3g} images/s on one device, {measured} (VAE and text encoders included)",
        f"per image: {plan.forwards_per_image:.4g} forwards of the denoiser, {format_bytes(plan.bytes_per_image)}",
    ]
    if plan.peak_memory is not None:
        lines.append(f"peak GPU memory: {format_bytes(plan.peak_memory)}")
    if not plan.warm:
        lines.append("one batch took longer than --seconds, so the rate includes its warm-up: use a larger --seconds")
    lines.append("Not included: start-up, writing to storage, and devices that wait for each other.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
