"""``smpo-pipeline plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from smpo_common.files import write_json
from smpo_pipeline.images.buckets import buckets_in_words
from smpo_pipeline.planning.options import PlanOptions

if TYPE_CHECKING:
    from smpo_pipeline.planning.plan import Plan


def plan(options: PlanOptions) -> None:
    """Measure what `invert` with the same flags would cost: device hours, bytes, shards, dollars.

    Inverts some of the pairs on this machine's device for a minute and projects: for these pairs, for 1 and for 100
    million. Nothing is stored; --out, --concurrency, --ray-address and --overwrite may be given, and do nothing.
    """
    from smpo_pipeline.jobs.ray.session import check_device, plain_arithmetic  # noqa: PLC0415  (keeps --help free of torch and Ray)
    from smpo_pipeline.planning.plan import make_plan  # noqa: PLC0415

    device = check_device(options.running.device)
    plain_arithmetic(device)
    console = Console(markup=False)
    found = make_plan(options.replace(device=device), console)
    _show(console, found)
    bearable = options.running.max_reject_rate
    if 1 - found.usable > bearable:
        stops = f"above --max-reject-rate {bearable:g}: invert will stop"
        console.print(f"WARNING: that is {stops}", highlight=False, soft_wrap=True)
    if options.projection.json_:
        write_json(options.projection.json_, found.model_dump())


def _show(console: Console, found: Plan) -> None:
    hours = "GPU hours" if found.peak_memory is not None else "CPU hours"
    table = Table(title=f"invert on {found.device}, batches of {found.batch_size} trajectories")
    for column in ("pairs", hours, f"wall hours on {found.gpus}", "size", "shards", "dollars"):
        table.add_column(column, justify="right", overflow="fold")
    for each in found.projections:
        table.add_row(
            f"{each.pairs:,}",
            _number(each.device_hours),
            _number(each.wall_hours),
            _bytes(each.bytes),
            f"{each.shards:,}",
            "-" if each.dollars is None else f"{each.dollars:,.2f}",
        )
    console.print(table)
    counted = "measured" if found.forwards_measured else "exactly"
    rate = f"{found.pairs_a_second:.3g} pairs/s on one device, measured over {found.measured_trajectories} trajectories"
    forwards = f"{found.forwards_a_trajectory:.4g} forwards of the denoiser ({counted})"
    trajectory = f"{found.states_a_trajectory:.3g} states, {forwards}"
    lines = [
        f"{rate} in {found.measured_seconds:.1f} s (VAE and text encoders included)",
        f"a trajectory: {trajectory}, {_bytes(found.bytes_a_trajectory)}; rewards: {', '.join(found.rewards)}",
        f"decoding keeps {found.decoding_cores:.2g} CPU cores busy for each device",
    ]
    if found.peak_memory is not None:
        lines.append(f"GPU memory: {_bytes(found.peak_memory)} at the most")
    if not found.warm:
        lines.append("one batch took longer than --seconds: its start-up is part of the rate; give it more")
    if found.buckets:
        lines.append(f"image sizes, height x width: {buckets_in_words(found.buckets)}")
    if found.usable < 1:
        lines.append(f"{1 - found.usable:.1%} of {found.sampled} pairs looked at are of no use: counted as rejected")
    lines.append("Left out: starting up, writing to storage, and devices that wait for each other or for data.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _number(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"  # noqa: PLR2004


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:  # noqa: PLR2004
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"
