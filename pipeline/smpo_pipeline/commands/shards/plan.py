"""``smpo-pipeline plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from smpo_common.files import write_json
from smpo_pipeline.images.buckets import describe_buckets
from smpo_pipeline.planning.options import PlanOptions
from smpo_pipeline.terminal import format_bytes

if TYPE_CHECKING:
    from smpo_pipeline.planning.memory import MemoryPlan
    from smpo_pipeline.planning.plan import Plan


def plan(options: PlanOptions) -> None:
    """Estimate what `invert` with the same flags costs: device hours, bytes, shards, dollars.

    Inverts some of the pairs on this machine for a minute, and projects to all pairs, 1 million and 100 million.
    Nothing is stored. --out, --concurrency, --ray-address and --overwrite are accepted and ignored.

    With --gpu-memory, also the GPU memory that `invert` and `smpo-train` need; without --pairs that alone.
    With --prompts and the flags of `generate`, it estimates what that costs, as `generate --plan` does.

    Examples:
        smpo-pipeline plan --pairs data --scores scores --model stabilityai/stable-diffusion-3.5-medium --gpus 8
        smpo-pipeline plan --model black-forest-labs/FLUX.1-dev --gpu-memory 24
    """
    memory = _account(options) if options.memory.gpu_memory or not options.pairs else None
    if not options.pairs:
        if options.projection.json_ and memory:
            write_json(options.projection.json_, {"memory": memory.model_dump()})
        return
    from smpo_pipeline.jobs.cluster.session import resolve_device, set_reproducible_arithmetic  # noqa: PLC0415  (keeps --help free of torch and Ray)
    from smpo_pipeline.planning.plan import make_plan  # noqa: PLC0415

    device = resolve_device(options.running.device)
    set_reproducible_arithmetic(device)
    console = Console(markup=False)
    measured = make_plan(options.replace(device=device), console)
    _show(console, measured)
    if 1 - measured.usable > options.running.max_reject_rate:
        limit = f"--max-reject-rate {options.running.max_reject_rate:g}"
        console.print(f"WARNING: more than {limit} allows: invert will stop", highlight=False, soft_wrap=True)
    if options.projection.json_:
        write_json(
            options.projection.json_, measured.model_dump() | {"memory": memory.model_dump() if memory else None}
        )


def _account(options: PlanOptions) -> MemoryPlan:
    """Print the memory account."""
    from smpo_pipeline.planning.memory import plan_memory  # noqa: PLC0415  (keeps --help free of torch)
    from smpo_pipeline.planning.memory_table import show_memory  # noqa: PLC0415

    memory = plan_memory(options)
    show_memory(Console(markup=False), memory)
    return memory


def _show(console: Console, plan: Plan) -> None:
    hours = "GPU hours" if plan.peak_memory is not None else "CPU hours"
    table = Table(title=f"invert on {plan.device}, batches of {plan.batch_size} trajectories")
    sizes = ("shards' size", "text's size") if plan.text else ("size",)
    for column in ("pairs", hours, f"wall hours on {plan.gpus}", *sizes, "shards", "dollars"):
        table.add_column(column, justify="right", overflow="fold")
    for projection in plan.projections:
        table.add_row(
            f"{projection.pairs:,}",
            _number(projection.device_hours),
            _number(projection.wall_hours),
            *map(format_bytes, (projection.bytes, projection.text_bytes) if plan.text else (projection.bytes,)),
            f"{projection.shards:,}",
            "-" if projection.dollars is None else f"{projection.dollars:,.2f}",
        )
    console.print(table)
    counted = "measured" if plan.forwards_measured else "exact"
    rate = f"{plan.pairs_per_second:.3g} pairs/s on one device, measured over {plan.measured_trajectories} trajectories"
    forwards = f"{plan.forwards_a_trajectory:.4g} forwards of the denoiser ({counted})"
    trajectory = f"{plan.states_a_trajectory:.3g} states, {forwards}"
    lines = [
        f"{rate} in {plan.measured_seconds:.1f} s (VAE {'' if plan.text else 'and text encoders '}included)",
        f"per trajectory: {trajectory}, {format_bytes(plan.bytes_a_trajectory)}; rewards: {', '.join(plan.rewards)}",
        f"decoding needs {plan.decoding_cores:.2g} CPU cores per device",
    ]
    if plan.text:
        prompts, seconds = plan.text.prompts, plan.text.seconds_per_prompt
        lines.append(
            f"text: {prompts:,} prompts, each encoded and stored once in {format_bytes(plan.text.bytes)}; "
            f"{1 / seconds:.3g} prompts/s on one device"
        )
    if plan.peak_memory is not None:
        lines.append(f"peak GPU memory: {format_bytes(plan.peak_memory)}")
    if not plan.warm:
        lines.append("one batch took longer than --seconds, so the rate includes its warm-up: use a larger --seconds")
    if plan.buckets:
        lines.append(f"image sizes, height x width: {describe_buckets(plan.buckets)}")
    if plan.usable < 1:
        lines.append(f"{1 - plan.usable:.1%} of {plan.sampled} sampled pairs would be rejected")
    lines.append("Not included: start-up, writing to storage, and devices that wait for each other or for data.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"  # noqa: PLR2004
