"""Check inversion: its numbers in half precision and in any batch, and its time by part."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import pyarrow as pa
import torch
from torch import nn

from benchmarks.acceptance.checks.arithmetic import distance
from benchmarks.acceptance.checks.ceilings import roofline
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import GIB, World, conditioned, known_fingerprints, latents, random_pair
from smpo_models.family import Family
from smpo_pipeline.images.buckets import Size as ImageSize
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.requests import batches_of_one_size
from smpo_pipeline.isolation import Failure
from smpo_pipeline.jobs.invert import actor as invert_unit
from smpo_pipeline.jobs.invert import job
from smpo_pipeline.jobs.invert.actor import InvertActor
from smpo_pipeline.jobs.invert.models import describe_model, load_models
from smpo_pipeline.jobs.invert.options import (
    InvertJobOptions,
    InvertOptions,
    ModelOptions,
    StorageOptions,
    TrajectoryOptions,
)
from smpo_pipeline.jobs.invert.prepare import prepare_unit, unit_row
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.pairs import layouts_of, list_pair_files, slice_files
from smpo_schemas.scoring.scores import read_scores_info
from smpo_schemas.shards.samples import Sample


def settings_of(world: World, dtype: str) -> InversionSettings:
    """Default settings, except for the number of steps of a tiny run."""
    return InversionSettings(steps=world.size.steps, dtype=dtype)


def make_inverter(world: World, family: Family, dtype: str, **settings: object) -> Inverter:
    """Make the actor's inverter, with other ``settings`` if given."""
    told = settings_of(world, dtype).model_copy(update=settings)
    return Inverter(family, family.denoiser, told, seed=0, device=world.device.name)


# The numbers


def check_inversion(world: World, report: Report) -> None:
    """Compare half precision with float32, and batches of one with larger ones; invert images of several sizes."""
    family, side = world.load("sd15"), world.pixels("sd15")
    pairs = [random_pair(number, side, side) for number in range(max(world.size.batches[-2], 2))]
    exact = _stacked(report, "fp32", make_inverter(world, family, "fp32"), pairs[:2])
    for dtype in ("fp16", "bf16"):
        inverter = make_inverter(world, world.load("sd15"), dtype)
        found = _stacked(report, dtype, inverter, pairs[:2])
        _compare(report, dtype, found, exact, (0.03, 0.03))
    alone = [_stacked(report, f"alone, {pair.pair_id}", inverter, [pair]) for pair in pairs[:2]]
    together = {name: each[:2] for name, each in _stacked(report, "together", inverter, pairs).items()}
    one_by_one = {name: torch.cat([each[name] for each in alone]) for name in together}
    _compare(report, f"batch of {len(pairs)} against 1, bf16", together, one_by_one, (0.02, 0.02))
    mixed = [random_pair(0, side, side), random_pair(1, side, 2 * side), random_pair(2, side, side)]
    requests = [(pair, 0) for pair in mixed]
    made = [
        inverter.invert([requests[each] for each in batch])[0] for batch in batches_of_one_size(requests, lambda: 8)
    ]
    rejected = sum(isinstance(each, Failure) for batch in made for each in batch)
    report.judge("rejected of mixed sizes", rejected, most=0)


def _stacked(report: Report, name: str, inverter: Inverter, pairs: Sequence[PreparedPair]) -> dict[str, torch.Tensor]:
    """Stack the samples' tensors, one row per pair."""
    samples = inverter.invert([(pair, 0) for pair in pairs])[0]
    report.judge(f"{name}: rejected", sum(isinstance(each, Failure) for each in samples), most=0)
    whole = [each for each in samples if isinstance(each, Sample)]
    return {
        "tau": torch.stack([each.noise_K2Chw for each in whole]).float(),
        "ref_error": torch.stack([each.ref_error_K2 for each in whole]),
        "residual": torch.stack([each.residual_K2 for each in whole]),
        "x0": torch.stack([each.x0_2Chw for each in whole]).float(),
    }


def _compare(
    report: Report,
    name: str,
    found: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor],
    limits: tuple[float, float],
) -> None:
    report.judge(f"{name}: tau", distance(found["tau"], exact["tau"]), most=limits[0])
    report.judge(f"{name}: ref_error", distance(found["ref_error"], exact["ref_error"]), most=limits[1])
    report.judge(f"{name}: x0 and tau finite", _finite(found), least=1)
    report.note(
        **{
            f"{name}: residual": float(found["residual"].nanmean()),
            f"{name}: residual there": float(exact["residual"].nanmean()),
            f"{name}: x0": distance(found["x0"], exact["x0"]),
        }
    )


def _finite(found: dict[str, torch.Tensor]) -> bool:
    return all(bool(found[name].isfinite().all()) for name in ("x0", "tau"))


# The rates


class Split:
    """Measure the device's seconds inside a model's denoisers, VAE and text encoders."""

    def __init__(self, world: World, family: Family, denoisers: Iterable[nn.Module]) -> None:
        self._device, self._family, self._denoisers = world.device, family, list(denoisers)
        self._marks: dict[str, list[tuple[Any, Any]]] = {"UNet": [], "VAE": [], "text": []}

    def __enter__(self) -> Self:
        family, begun = self._family, []

        def begin(*_call: object) -> None:
            begun.append(self._device.mark())

        def end(*_call: object) -> None:
            self._marks["UNet"].append((begun.pop(), self._device.mark()))

        self._hooks = [each.register_forward_pre_hook(begin) for each in self._denoisers]
        self._hooks += [each.register_forward_hook(end) for each in self._denoisers]
        self._before = family.posterior, family.encode_text
        family.posterior = self._marked("VAE", family.posterior)
        family.encode_text = self._marked("text", family.encode_text)
        return self

    def _marked(self, name: str, work: Any) -> Any:  # noqa: ANN401
        def call(*arguments: object) -> object:
            begin = self._device.mark()
            made = work(*arguments)
            self._marks[name].append((begin, self._device.mark()))
            return made

        return call

    def __exit__(self, *_error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._family.posterior, self._family.encode_text = self._before

    def seconds(self) -> dict[str, float]:
        """By part."""
        self._device.synchronize()
        return {name: sum(self._device.between(*each) for each in marks) for name, marks in self._marks.items()}


def check_inversion_rate(world: World, report: Report) -> None:
    """Measure SD 1.5: batch sizes, TF32 and memory format of the VAE, and the whole actor, which writes shards."""
    world.wait_for_others()
    best = _rates_by_batch(world, report)
    world.device.clean()
    report.note(roofline_seconds_per_pair=best)
    rate = _run_actor(world, report, "sd15", world.size.unit, world.size.units, world.work / "shards-sd15")
    world.notes["inverted"] = rate
    report.judge("actor's rate against the roofline", best and rate * best, least=0.8, on_cpu=False)


def _rates_by_batch(world: World, report: Report) -> float | None:
    """Returns the seconds that the device's rates allow a pair of the largest batch, None where they are not known."""
    family, side = world.load("sd15"), world.pixels("sd15")
    inverter = make_inverter(world, family, "bf16")
    pairs = [random_pair(number, side, side) for number in range(world.size.batches[-1])]
    inverter.invert([(pairs[0], 0)])  # what is set up once
    for count in world.size.batches:
        clock, split = _timed(world, family, inverter, pairs[:count])
        report.note(
            **{f"{count} trajectories: pairs/s": count / clock, f"{count} trajectories: share": _shares(split, clock)}
        )
    few = pairs[: world.size.batches[-2]]
    with world.device.tf32():
        clock, split = _timed(world, family, inverter, few)
    report.note(**{"tf32: pairs/s": len(few) / clock, "tf32: share": _shares(split, clock)})
    _note_vae_layouts(world, report, family)
    return _seconds_per_pair(world, family, inverter, len(pairs))


def check_xl_inversion(world: World, report: Report) -> None:
    """Measure the actor on one unit with SDXL, and its peak memory."""
    with known_fingerprints():
        _run_actor(world, report, "sdxl", world.size.xl_pairs, 1, world.work / "shards-sdxl")
    report.note(peak_GiB=world.device.peak() / GIB)
    report.judge("peak GiB", world.device.peak() / GIB, most=80e9 / GIB, on_cpu=False)


def _timed(
    world: World, family: Family, inverter: Inverter, pairs: Sequence[PreparedPair]
) -> tuple[float, dict[str, float]]:
    """Seconds of a batch, in total and by part."""
    requests = [(pair, 0) for pair in pairs]
    world.device.synchronize()
    with Split(world, family, inverter.denoisers) as split:
        began = time.perf_counter()
        inverter.invert(requests)
        world.device.synchronize()
        clock = time.perf_counter() - began
    return clock, split.seconds()


def _shares(split: dict[str, float], clock: float) -> dict[str, float]:
    shares = {name: seconds / clock for name, seconds in split.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def _note_vae_layouts(world: World, report: Report, family: Family) -> None:
    """Compare pixels as images give them (a channels_last view) with contiguous ones."""
    side = world.pixels("sd15")
    pixels = torch.rand(2, side, side, 3, device=world.device.name).permute(0, 3, 1, 2)
    for name, given in (("as they come", pixels), ("contiguous", pixels.contiguous())):
        seconds = world.device.seconds(lambda given=given: family.posterior(given))
        report.note(**{f"VAE, pixels {name}: ms an image": 500 * seconds})


@torch.no_grad()
def _seconds_per_pair(world: World, family: Family, inverter: Inverter, trajectories: int) -> float | None:
    """Seconds per pair at the device's rates: UNet, VAE and text encoder for a batch of SD 1.5 trajectories."""
    rows, side = 2 * trajectories, world.pixels("sd15")
    x, seen = latents(world, "sd15", rows), conditioned(world, family, "sd15", rows)
    t = torch.full((rows,), 500, device=world.device.name)
    pixels = torch.zeros(rows, 3, side, side)
    (inverting_denoiser,) = inverter.denoisers - {family.denoiser}
    estimate = roofline(world, lambda: family.denoise(inverting_denoiser, x, t, seen))
    with torch.autocast(world.device.name, torch.bfloat16):
        error = roofline(world, lambda: family.denoise(family.denoiser, x, t, seen))
    others = roofline(world, lambda: (family.posterior(pixels), conditioned(world, family, "sd15", rows)))
    if estimate is None or error is None or others is None:
        return None
    # Two estimates and the reference's error at each step.
    return (world.size.steps * (2 * estimate + error) + others) / trajectories


# The actor


def _run_actor(world: World, report: Report, shape: str, unit: int, units: int, out: Path) -> float:
    """Do the work of `invert` without Ray, from prepared units to shards and manifest; returns pairs per second.

    The clock runs over the units after the first where there are several, and over all of them where there are not.
    """
    folder = world.pairs(shape, unit * units)
    options = _options(world, shape, folder, out, unit)
    rows = _prepared(world, shape, folder / "pairs.parquet", unit)
    info = read_scores_info(options.scores)
    scores = job._score_table(options.scores, info)  # noqa: SLF001
    run = Run(options.out, MANIFEST_FILE, {})
    run.open(overwrite=False, patterns=())
    loaded, resolution = load_models(options), world.pixels(shape)
    model = describe_model(options, *loaded)
    # SDXL takes seconds to load. Ray would hand over the scores.
    with (
        patch.object(invert_unit, "load_models", lambda _options, **_: loaded),
        patch.object(invert_unit.ray, "get", lambda value: value),
    ):
        # As many rows that only the first unit measures health, which costs forward passes of its own.
        actor = InvertActor(
            options, model=model, run=run, scores=scores, rows=10**6, resolution=resolution, work_log=WorkLog()
        )
    records, clocks, splits = [], [], []
    for row in rows:
        world.device.synchronize()
        began = time.perf_counter()
        with Split(world, actor._family, actor._inverter.denoisers) as split:  # noqa: SLF001
            records.append(UnitRecord.model_validate_json(actor(row)["record"][0].as_py()))
        clocks.append(time.perf_counter() - began)
        splits.append(split.seconds())
    checked = job._Checked(model, resolution, (), unit, 0, 0, kept=None, samplings=[], pair_bytes=0)  # noqa: SLF001
    manifest = job._finish(options, run, records, info, checked, text=None)  # noqa: SLF001
    run.finish()
    report.judge(f"{shape}: rejected", manifest.totals.rejected, most=0)
    seen = slice(1 if len(clocks) > 1 else 0, None)
    clock = sum(clocks[seen])
    share = _shares({name: sum(each[name] for each in splits[seen]) for name in splits[0]}, clock)
    rate = sum(record.pairs for record in records[seen]) / clock
    report.note(**{f"{shape} actor: pairs/s": rate, f"{shape} actor: share": share})
    report.judge(f"{shape} actor: UNet's share of the clock", share["UNet"], least=0.9, on_cpu=False)
    return rate


def _options(world: World, shape: str, folder: Path, out: Path, unit: int) -> InvertOptions:
    """Options of `invert`."""
    batch_size = min(unit, world.size.batches[-1])
    return InvertOptions(
        pairs=(folder / "pairs.parquet",),
        scores=folder / "scores",
        out=out,
        models=ModelOptions(model=str(world.model(shape))),
        trajectory=TrajectoryOptions(steps=world.size.steps),
        storing=StorageOptions(pairs_per_shard=unit),
        running=InvertJobOptions(
            batch_size=batch_size, device=world.device.name, dtype="bf16", concurrency=1, max_reject_rate=0.0
        ),
    )


def _prepared(world: World, shape: str, pairs: Path, unit: int) -> list[pa.Table]:
    files = list_pair_files([pairs])
    layouts = layouts_of(files)
    sizes: list[ImageSize] = [(world.pixels(shape),) * 2]
    rows = []
    for number, ranges in enumerate(slice_files(files, unit, None)):
        rows.append(unit_row(number, *prepare_unit(ranges, layouts, number * unit, sizes)))
    return rows
