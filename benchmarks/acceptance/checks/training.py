"""Run smpo-train in this process, and the bare step that no trainer can be faster than."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.optimization import Adafactor

from benchmarks.acceptance.checks.arithmetic import random_states
from benchmarks.acceptance.checks.ceilings import operations
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import GIB, World, conditioned, known_fingerprints
from smpo_models.family import Conditioning
from smpo_models.loading import fuse_lora
from smpo_models.tuned.lora import add_lora
from smpo_schemas.trained_model import LORA_FILE
from smpo_trainer.cli import app
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.model.denoising_error import pair_errors
from smpo_trainer.monitoring import utilization
from smpo_trainer.trainer import Trainer

Records = list[dict[str, Any]]


def arguments(world: World, shape: str, out: Path, *flags: object, precision: str = "bf16") -> list[str]:
    """Arguments of smpo-train for a run whose steps change the weights little."""
    fixed = ["--shards", world.work / f"shards-{shape}", "--model", world.model(shape), "--out", out]
    fixed += ["--device", world.device.name]
    fixed += ["--dtype", precision, "--warmup-steps", 0, "--lr", 1e-6, "--workers", 2]
    return [str(each) for each in (*fixed, *flags)]


def train(
    world: World, shape: str, out: Path, *flags: object, precision: str = "bf16", leave_before: int | None = None
) -> tuple[Records, int]:
    """Run smpo-train; returns what it logged of its steps, and its exit status.

    Args:
        world: of the checks.
        shape: of the model.
        out: of the run.
        flags: further ones.
        precision: of ``--dtype``.
        leave_before: the number of the step at which the run is left, so that nothing is saved: 10 GB of SD 1.5, 30 of
            SDXL.
    """

    def leave(_trainer: Trainer, number: int, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        return sys.exit() if number == leave_before else make()

    status = 0
    try:
        with around_steps(leave):
            app(arguments(world, shape, out, *flags, precision=precision), standalone_mode=False)
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        AcceleratorState._reset_state(True)  # noqa: SLF001  (this process goes on to other runs)
        GradientState._reset_state()  # noqa: SLF001
        world.device.clean()
    return records_of(out), status


def records_of(out: Path) -> Records:
    """Read a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@contextmanager
def around_steps(watch: Callable[[Trainer, int, Callable[[], Any]], Any]) -> Iterator[None]:
    """Have ``watch(trainer, number, make)`` make each step of smpo-train inside the context."""
    before = Trainer.train_step

    def step(self: Trainer, number: int, batches: Any) -> Any:  # noqa: ANN401
        return watch(self, number, lambda: before(self, number, batches))

    with patch.object(Trainer, "train_step", step):
        yield


# The lower bound of a step


class Bare:
    """Forward and backward passes of ready tensors under bfloat16 autocast, and the optimizer, without synchronisation.

    Attributes:
        denoiser: what is trained.
    """

    def __init__(self, world: World, shape: str, *, lora: int = 0) -> None:
        self._world, self._shape = world, shape
        self._ready: dict[int, tuple[StateBatch, Conditioning]] = {}
        self._family = world.load(shape, ("denoiser", "text"))
        self._seen = conditioned(world, self._family, shape, 1)
        self._family.text_modules = ()
        self.denoiser = self._family.denoiser
        if lora:
            add_lora(self.denoiser, self._family.lora_targets, lora, idle=self._family.idle_layers)
        else:
            self.denoiser.requires_grad_(True)
        self._trained = [each for each in self.denoiser.parameters() if each.requires_grad]
        self._optimizer: torch.optim.Optimizer = torch.optim.AdamW(self._trained, lr=1e-8, fused=True)

    def use_adafactor(self) -> None:
        """Replace AdamW by Adafactor."""
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        self._optimizer = Adafactor(self._trained, lr=1e-8, **fixed)

    def gradient(self, pairs: int) -> None:
        """Run forward and backward."""
        if pairs not in self._ready:
            rows = torch.zeros(2 * pairs, dtype=torch.int64, device=self._world.device.name)
            self._ready[pairs] = random_states(self._world, self._shape, pairs), self._seen[rows]
        batch, seen = self._ready[pairs]
        with torch.autocast(self._world.device.name, torch.bfloat16):
            error_B2 = pair_errors(self._family, self.denoiser, batch, seen)
        nn.functional.softplus(2000 * (error_B2[:, 0] - error_B2[:, 1])).mean().backward()

    def update(self) -> None:
        """Clip the gradient and step."""
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def step(self, pairs: int) -> None:
        """Run both."""
        self.gradient(pairs)
        self.update()

    def rate(self, pairs: int) -> float:
        """Pairs per second."""
        return pairs / self._world.device.seconds(lambda: self.step(pairs))


# The checks


def check_training(world: World, report: Report) -> None:
    """Measure SD 1.5: a run's rate, waiting, memory, MFU and reference noise, the bare step, and a profiled step."""
    size, device = world.size, world.device
    flags = ["--batch-size", size.pairs, "--max-steps", size.train_steps, "--save-every", size.train_steps]
    records, _ = train(world, "sd15", world.work / "whole", *flags)
    world.notes["whole"] = records
    settled = records[2:]
    rate = median(each["states_per_second"] for each in settled)
    report.note(states_per_second=rate, memory_GiB=settled[-1]["memory_gib"])
    report.judge("waiting for data, %", median(each["data_wait_percent"] for each in settled), most=1, on_cpu=False)
    grown = settled[-1]["memory_gib"] / settled[0]["memory_gib"]
    report.judge("memory at the end over that at step 3", grown, most=1.01, on_cpu=False)
    noise = records[0].get("reference_noise/std")
    report.judge("noise of the stored reference, std of the margin", noise, most=0.1, on_cpu=False)
    report.note(**_noise(records))
    bare = Bare(world, "sd15")
    by_pairs = {pairs: bare.rate(pairs) for pairs in size.bare}
    report.note(**{f"bare at {pairs} pairs: pairs/s": each for pairs, each in by_pairs.items()})
    report.judge("pairs/s", rate, least=0.9 * by_pairs[size.pairs], on_cpu=False)
    # Other kernels of attention compute its products once more in the backward, and count them.
    with sdpa_kernel(SDPBackend.MATH):
        of_pair = operations(lambda: bare.gradient(1))
    _judge_mfu(world, report, settled[-1], of_pair)
    table, busy, kernels = device.profiled(lambda: bare.step(size.pairs))
    report.note(profiled_busy_share=busy, profiled_kernels=kernels)
    (world.out / "profile.txt").write_text(table, encoding="utf-8")
    (world.out / "train.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")


def _judge_mfu(world: World, report: Report, record: dict[str, Any], of_pair: float) -> None:
    """Compare the logged MFU with the one from a pair's operations, the rate and the device's peak."""
    logged, peaks = record.get("mfu_percent"), utilization._PEAKS  # noqa: SLF001
    # MFU is logged only for known devices; any other name stands in, so that a CPU runs this code too.
    half, *_ = peaks.get(world.device.describe()["device"], next(iter(peaks.values())))
    expected = 100 * of_pair * record["states_per_second"] / (half * 1e12)
    report.note(TFLOP_per_pair=of_pair / 1e12, mfu_percent=logged)
    report.judge("MFU over a hand count", logged and logged / expected, least=0.98, most=1.02, on_cpu=False)


def check_xl_training(world: World, report: Report) -> None:
    """Measure SDXL: bare steps, Adafactor's steps, and smpo-train with gradient checkpointing."""
    bare, size = _rate_bare_xl(world, report), world.size
    world.device.clean()
    flags = ["--batch-size", size.xl_train, "--gradient-checkpointing", "--reference", "stored"]
    with known_fingerprints():
        records, _ = train(world, "sdxl", world.work / "xl", *flags, leave_before=min(4, size.train_steps))
    rate, memory = median(each["states_per_second"] for each in records[1:]), records[-1]["memory_gib"]
    report.note(states_per_second=rate, memory_GiB=memory, **_noise(records))
    report.judge("memory of smpo-train, GiB", memory, most=80e9 / GIB, on_cpu=False)
    report.judge("pairs/s", rate, least=0.9 * bare, on_cpu=False)
    (world.out / "train-sdxl.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    shutil.rmtree(world.work / "xl")


def _rate_bare_xl(world: World, report: Report) -> float:
    """Pairs per second of the bare step that smpo-train is compared with."""
    size, device, bare = world.size, world.device, Bare(world, "sdxl")
    rate = bare.rate(1)
    report.note(**{"bare, 1 pair: pairs/s": rate, "bare, 1 pair: peak GiB": device.peak() / GIB})
    # Weights, gradients and AdamW 38.3 GiB; their bf16 copies 4.8; activations of two rows 16.
    report.judge("bare, 1 pair: peak over 59.1 GiB", device.peak() / GIB / 59.1, least=0.9, most=1.1, on_cpu=False)
    device.clean()
    bare.denoiser.enable_gradient_checkpointing()
    rate, name = bare.rate(size.xl_train), f"bare, {size.xl_train} pairs, checkpointing"
    report.note(**{f"{name}: pairs/s": rate, f"{name}: peak GiB": device.peak() / GIB})
    bare.use_adafactor()
    report.note(seconds_with_Adafactor=device.seconds(lambda: bare.step(1)))
    report.note(seconds_of_the_gradient=device.seconds(lambda: bare.gradient(1)))
    return rate


def _noise(records: Records) -> dict[str, float]:
    return {name: value for name, value in records[0].items() if name.startswith("reference_noise")}


def check_lora(world: World, report: Report) -> None:
    """Train a LoRA of SD 1.5 with the live reference and check its file; measure the memory of SDXL's."""
    out = world.work / "lora"
    flags = ["--batch-size", world.size.pairs, "--lora-rank", 16, "--reference", "live", "--max-steps", 4]
    records, _ = train(world, "sd15", out, *flags)
    report.judge("margin of the first step", records[0]["rewards/margins"], least=0, most=0)
    report.judge("steps with a loss", sum(each["loss"] is not None for each in records), least=4)
    report.judge("weights that the adapter changes", _fused(world, out / LORA_FILE), least=1)
    shutil.rmtree(out)
    world.device.clean()
    bare = Bare(world, "sdxl", lora=16)
    bare.denoiser.enable_gradient_checkpointing()
    bare.step(1)
    report.judge("SDXL's adapter: peak GiB", world.device.peak() / GIB, most=24e9 / GIB, on_cpu=False)


def _fused(world: World, file: Path) -> int:
    """Count the weights that a LoRA file changes; a file that does not fit is an error."""
    denoiser = world.load("sd15", ("denoiser",)).denoiser
    before = {name: each.clone() for name, each in denoiser.named_parameters()}
    fuse_lora(denoiser, file, "the adapter", "sd15")
    return sum(bool((each != before[name]).any()) for name, each in denoiser.named_parameters())


def check_compile(world: World, report: Report) -> None:
    """Measure SD 1.5 with `--compile` in training, a compiled forward pass, and channels_last without compilation."""
    size, device = world.size, world.device
    flags = ["--batch-size", size.pairs, "--compile"]
    with device.compiling():
        records, _ = train(world, "sd15", world.work / "compiled", *flags, leave_before=min(6, size.train_steps))
        eager = world.notes["whole"]
        apart = max(abs(one["loss"] - other["loss"]) for one, other in zip(records, eager, strict=False))
        report.judge("largest difference of a loss", apart, most=1e-2)
        report.note(
            states_per_second=median(each["states_per_second"] for each in records[1:]),
            states_per_second_eager=median(each["states_per_second"] for each in eager[1:]),
            first_step_seconds=size.pairs / records[0]["states_per_second"],
        )
        for name, forward in _forwards(world):
            report.note(**{f"forward, {name}: ms": 1000 * device.seconds(forward)})


def _forwards(world: World) -> Iterator[tuple[str, Callable[[], object]]]:
    family, rows = world.load("sd15", ("denoiser", "text")), 32 if world.size.divide == 1 else 2
    batch, seen = random_states(world, "sd15", rows // 2), conditioned(world, family, "sd15", rows)
    denoiser = family.denoiser.to(torch.bfloat16)

    def forward() -> object:
        with torch.no_grad():
            return pair_errors(family, denoiser, batch, seen)

    yield "eager", forward
    denoiser.to(memory_format=torch.channels_last)
    yield "channels_last", forward
    denoiser.to(memory_format=torch.contiguous_format)
    denoiser.compile()
    yield "compiled", forward
