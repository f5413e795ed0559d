"""``smpo-pipeline plan``."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from smpo_common.files import write_json
from smpo_common.store_path import parse_path
from smpo_pipeline.commands import options as opt
from smpo_pipeline.commands.invert import SETTINGS_FLAGS, inversion_settings, invert, parse_shard_size
from smpo_pipeline.images.buckets import buckets_in_words

if TYPE_CHECKING:
    from smpo_pipeline.planning.plan import Plan

_PLAN = "Plan"
_IDLE = {"out": None, "concurrency": None, "ray_address": None, "overwrite": False}
"""Flags of `invert` that change nothing of what a device does, with their defaults: taken, so that its command line and
its config file are."""

ScoresOption = Annotated[
    str | None,
    typer.Option(
        "--scores",
        metavar="DIR|URL",
        callback=opt.existing("--scores"),
        help="Output of `score`: which rewards the shards will carry; default: one.",
        rich_help_panel=_PLAN,
    ),
]
GpusOption = Annotated[
    int, typer.Option("--gpus", min=1, help="Devices (on cpu: cores) at work at once.", rich_help_panel=_PLAN)
]
PriceOption = Annotated[
    float | None, typer.Option("--price", min=0, help="Dollars for one device hour.", rich_help_panel=_PLAN)
]
SecondsOption = Annotated[
    float,
    typer.Option("--seconds", min=0.1, help="How long to measure, warm-up included.", rich_help_panel=_PLAN),
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        parser=opt.local_path,
        callback=opt.writable("--json", file=True),
        help="Write the plan as JSON, too.",
        rich_help_panel=_PLAN,
    ),
]


def plan(context: typer.Context, **flags: Any) -> None:  # noqa: ANN401  (each flag's type is in the signature below)
    """Measure what `invert` with the same flags would cost: device hours, bytes, shards, dollars.

    Inverts some of the pairs on this machine's device for a minute and projects: for these pairs, for 1 and for 100
    million. Nothing is stored; --out, --concurrency, --ray-address and --overwrite may be given, and do nothing.
    """
    from smpo_pipeline.jobs.ray.session import check_device, plain_arithmetic  # noqa: PLC0415  (keeps --help free of torch and Ray)
    from smpo_pipeline.planning.plan import PlanOptions, make_plan  # noqa: PLC0415

    device = check_device(flags["device"])
    plain_arithmetic(device)
    settings = inversion_settings(context, device, **{name: flags[name] for name in SETTINGS_FLAGS})
    same = ("model", "unet", "inverting_unet", "vae", "variant", "resolution", "seed", "pairs_per_shard", "limit")
    columns = opt.columns_by_field(*(flags[f"{name}_column"] for name in opt.COLUMN_FIELDS))
    found = make_plan(
        PlanOptions(
            pairs=[parse_path(path) for path in flags["pairs"]],
            scores=parse_path(flags["scores"]) if flags["scores"] else None,
            **{name: flags[name] for name in (*same, "gpus", "price", "seconds")},
            settings=settings,
            columns=columns,
            shard_bytes=parse_shard_size(context, flags["shard_size"]),
            batch_size=opt.parse_batch_size(flags["batch_size"]),
            device=device,
        )
    )
    console = Console(markup=False)
    _show(console, found)
    if 1 - found.usable > flags["max_reject_rate"]:
        stops = f"above --max-reject-rate {flags['max_reject_rate']:g}: invert will stop"
        console.print(f"WARNING: that is {stops}", highlight=False, soft_wrap=True)
    if flags["json"]:
        write_json(flags["json"], found.model_dump())


def _flags() -> inspect.Signature:
    """The flags of `invert` that change what it costs, whatever they come to be, and those of this command."""
    own = {
        "scores": (ScoresOption, None),
        "gpus": (GpusOption, 1),
        "price": (PriceOption, None),
        "seconds": (SecondsOption, 60.0),
        "json": (FileOption, None),
    }
    parameters = inspect.signature(invert, eval_str=True).parameters
    kept = [each for name, each in parameters.items() if name not in own and name not in _IDLE]
    kept += [_hidden(parameters[name]).replace(default=default) for name, default in _IDLE.items()]
    added = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=default)
        for name, (kind, default) in own.items()
    ]
    return inspect.Signature([*kept, *added])


def _hidden(parameter: inspect.Parameter) -> inspect.Parameter:
    """The same flag, left out of the help."""
    kind, option = get_args(parameter.annotation)
    shown = copy.copy(option)
    shown.hidden = True
    return parameter.replace(annotation=Annotated[kind, shown])


plan.__signature__ = _flags()  # type: ignore[attr-defined]
plan.__annotations__ = {name: each.annotation for name, each in plan.__signature__.parameters.items()}  # type: ignore[attr-defined]


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
