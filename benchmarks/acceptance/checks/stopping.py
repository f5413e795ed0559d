"""Check a run that is stopped and resumed, a step that overflows, averages, held-out pairs and validation images."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from benchmarks.acceptance.checks.arithmetic import distance
from benchmarks.acceptance.checks.training import around_steps, train
from benchmarks.acceptance.device import resident
from benchmarks.acceptance.runner import Report
from benchmarks.acceptance.world import PROMPT, World
from smpo_trainer.train_loop import TrainLoop
from smpo_trainer.trainer import Trainer

_COMPARED = ("loss", "grad_norm", "drift")


def check_resume(world: World, report: Report) -> None:
    """Send SIGTERM to a run of SD 1.5, run the same command again, and measure writing and reading the checkpoint."""
    size, out = world.size, world.work / "stopped"
    flags = ["--batch-size", size.pairs, "--max-steps", size.train_steps, "--save-every", size.train_steps]
    costs: dict[str, float] = {}

    def stop(_trainer: Trainer, number: int, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        record = make()
        if number + 1 == size.stop_after:
            signal.raise_signal(signal.SIGTERM)
        return record

    with around_steps(stop), patch.object(TrainLoop, "_save", _timed(TrainLoop._save, "writing", costs)):  # noqa: SLF001
        records, status = train(world, "sd15", out, *flags)
    report.judge("steps when it was stopped", len(records), least=size.stop_after, most=size.stop_after)
    report.judge("exit status of the stopped run", status, least=128 + signal.SIGTERM, most=128 + signal.SIGTERM)
    files = [file for folder in out.glob("checkpoint-*") for file in folder.rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    report.note(checkpoint_GB=written / 1e9, writing_seconds=costs["writing"])
    seconds = median(size.pairs / each["states_per_second"] for each in records)
    stall = costs["writing"] / (costs["writing"] + 50 * seconds)
    report.note(stall_share_of_a_checkpoint_every_50_steps=stall)
    with patch.object(TrainLoop, "_resume", _timed(TrainLoop._resume, "reading", costs)):  # noqa: SLF001
        records, _ = train(world, "sd15", out, *flags)
    report.note(reading_seconds=costs["reading"])
    report.judge("memory added by reading, over the bytes", costs["reading bytes"] / written, most=2, on_cpu=False)
    _judge_same_course(world, report, records, out)
    for checkpoint in world.work.glob("whole/checkpoint-*"):
        shutil.rmtree(checkpoint)
    shutil.rmtree(out)


def _timed(work: Callable[..., Any], name: str, costs: dict[str, float]) -> Callable[..., Any]:
    """Wrap a function to record its seconds and the peak of the memory that it added."""

    def call(*arguments: object) -> Any:  # noqa: ANN401
        before, began = resident(), time.perf_counter()
        with _watched() as most:
            made = work(*arguments)
        costs[name] = time.perf_counter() - began
        costs[f"{name} bytes"] = max(0, most[0] - before)
        return made

    return call


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Record the peak resident memory inside the context, sampled a hundred times per second."""
    most, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def _judge_same_course(world: World, report: Report, records: list[dict[str, Any]], out: Path) -> None:
    """Compare with the uninterrupted run: metrics after the stop, and the change of the weights."""
    whole = world.notes["whole"]
    report.judge("steps in the end", len(records), least=len(whole), most=len(whole))
    later = slice(world.size.stop_after, None)
    for name in _COMPARED:
        pairs = [(one[name], other[name]) for one, other in zip(records[later], whole[later], strict=True)]
        largest = max(abs(other) for _, other in pairs)
        apart = max(abs(one - other) for one, other in pairs) / (largest or 1.0)
        report.judge(f"{name} after the stop, relative difference", apart, most=0.02)
    start, end, other = (
        {name: tensor.float() for name, tensor in _weights(folder, world.device.name).items()}
        for folder in (world.model("sd15"), world.work / "whole", out)
    )
    found, exact = (torch.cat([(each[name] - start[name]).flatten() for name in start]) for each in (other, end))
    report.judge("update, relative difference", distance(found, exact), most=0.05)


def _weights(folder: Path, device: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in (folder / "unet").glob("*.safetensors"):
        found |= load_file(file, device)
    return found


def check_overflow(world: World, report: Report) -> None:
    """Train SD 1.5 in float16 with one overflow, a moving average, held-out pairs and validation images."""
    prompts = world.work / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na blue square\n", encoding="utf-8")
    flags = ["--batch-size", world.size.pairs // 2, "--grad-accum", 2, "--ema-decay", 0.99]
    flags += ["--val-fraction", 0.3, "--val-every", 2, "--image-prompts", prompts, "--image-every", 4]
    flags += ["--image-sampling-steps", 4, "--reference", "stored"]
    precision, seen = "fp16" if world.device.trains_in_fp16 else "bf16", _Overflow(world)
    out = world.work / "overflown"
    with around_steps(seen.step), patch.object(Trainer, "as_saved", seen.timed(Trainer.as_saved)):
        records, _ = train(world, "sd15", out, *flags, precision=precision, leave_before=4)
    report.judge("overflown step leaves weights bit-equal", seen.same, least=1)
    report.judge("another step does not", seen.changes, least=1)
    report.judge("scale after over before", seen.scale, least=0.5, most=0.5)
    report.judge("overflown steps that are counted", records[1]["skipped_steps"] - records[0]["skipped_steps"], least=1)
    report.judge("steps with a finite gradient", sum(each["grad_norm"] is not None for each in records), least=3)
    report.judge("looks at held-out pairs", sum("val/loss" in each for each in records), least=2)
    pictures = list(out.glob("validation/*.png"))
    report.judge("drawings", len(pictures), least=2)
    report.note(seconds_as_saved=seen.seconds, precision=precision)
    shutil.rmtree(out)


class _Overflow:
    """Makes the second step overflow and records the effect.

    Attributes:
        same: whether that step left the weights as they were.
        changes: whether the next one changed them.
        scale: of the loss, after the step over before; None where there is none.
        seconds: that each stay with the averaged weights took.
    """

    def __init__(self, world: World) -> None:
        self._device = world.device
        self.same = self.changes = False
        self.scale: float | None = None
        self.seconds: list[float] = []

    def step(self, trainer: Trainer, number: int, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Make a step, with an overflow in the second."""
        accelerator = trainer._accelerator  # noqa: SLF001
        if number == 0:
            self._device.begin_scale(accelerator)
        if number not in {1, 2}:
            return make()
        weights = list(trainer._policy.trainable_parameters().values())  # noqa: SLF001
        before = [each.detach().clone() for each in weights]
        scale = self._device.overflow(accelerator, weights[0]) if number == 1 else None
        record = make()
        equal = all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
        if number == 1:
            self.same = equal
            self.scale = scale and accelerator.scaler.get_scale() / scale
            self._device.end_overflow(accelerator)
        else:
            self.changes = not equal
        return record

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a context manager to record its seconds."""

        @contextmanager
        def entered(trainer: Trainer) -> Iterator[None]:
            began = time.perf_counter()
            with work(trainer):
                yield
            self._device.synchronize()
            self.seconds.append(time.perf_counter() - began)

        return entered
