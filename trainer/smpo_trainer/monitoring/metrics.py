"""Metrics of a step: their means over the effective batch, and their log as JSON lines and in trackers."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_schemas.trained_model import METRICS_FILE
from smpo_trainer.monitoring.trackers import start_tensorboard

ROOT_MEAN_SQUARES = frozenset({"rewards/margins_rms"})
"""Metrics of which the root of the mean square is logged, not the mean."""

Record = dict[str, float | int | None]
"""Metrics of a step by name; None if no pair of the step has the metric, or it is not finite."""


def json_record(record: Record) -> Record:
    """Replace values that are not finite by None, since JSON cannot hold them."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}


class StepMeter:
    """Averages per-pair values over the micro-batches and processes of a step."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the per-pair values of a micro-batch, each [B]; NaN where a pair has none."""
        for name, value_B in values.items():
            is_present_B = ~value_B.isnan()
            # float64: the mean must not depend on how the effective batch is split.
            power_B = value_B.double().where(is_present_B, 0) ** (2 if name in ROOT_MEAN_SQUARES else 1)
            sum_2 = torch.stack([power_B.sum(), is_present_B.double().sum()])
            self._sums[name] = self._sums[name] + sum_2 if name in self._sums else sum_2

    def means(self, accelerator: Accelerator) -> Record:
        """Return the means over all processes, by name. Collective."""
        names = sorted(self._sums)  # all processes must sum them in the same order
        sums_N2 = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return {
            name: (total / count) ** (0.5 if name in ROOT_MEAN_SQUARES else 1) if count else None
            for name, (total, count) in zip(names, sums_N2.tolist(), strict=True)
        }


class MetricsLog:
    """Writes ``metrics.jsonl`` (one object per step), TensorBoard files, and a Weights & Biases run.

    Attributes:
        earlier: records of the steps that were finished before.
    """

    def __init__(self, out: Path, finished_steps: int, wandb: WandBTracker | None = None) -> None:
        """Open for appending, after dropping records beyond ``finished_steps``, which a killed run has left."""
        self._wandb = wandb
        path = out / METRICS_FILE
        records = {line: record for line, record in _records(path) if (record["step"] or 0) <= finished_steps}
        self.earlier: list[Record] = list(records.values())
        # Keep the bytes of earlier lines: a resumed run must leave the same file as an uninterrupted one.
        write_bytes(path, b"".join(records))
        self._file = path.open("a", encoding="utf-8")
        self._excepthook, threading.excepthook = threading.excepthook, self._report_thread
        self._board = start_tensorboard(out, finished_steps)

    def write(self, record: Record) -> None:
        """Append the record of a step, and flush it to the operating system.

        Raises:
            UserError: the file cannot be written.
        """
        step = record["step"]
        values = {name: value for name, value in record.items() if value is not None and name != "step"}
        with self._writing():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            # TensorBoard groups metrics by their prefix.
            self._board.log({name if "/" in name else f"train/{name}": value for name, value in values.items()}, step)
        if self._wandb:
            self._wandb.log(values, step)

    def sync(self) -> None:
        """Write all records to disk, so that they survive a power cut like the checkpoint that follows.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            os.fsync(self._file.fileno())

    def draw(self, step: int, image_HW3: np.ndarray) -> None:
        """Log an image, uint8 [H, W, 3], to TensorBoard and Weights & Biases.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            self._board.log_images({"validation": image_HW3[None]}, step, dataformats="NHWC")
        if self._wandb:
            self._wandb.log_images({"validation": [image_HW3]}, step)

    def close(self) -> None:
        """Close all logs.

        Raises:
            UserError: buffered records cannot be written.
        """
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", self._excepthook)
            if self._wandb:
                stack.callback(self._wandb.finish)
            stack.enter_context(self._writing())
            stack.callback(self._board.finish)
            stack.callback(self._file.close)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # also from TensorBoard's files
            reason = error.strerror or error
            raise UserError(f"cannot write {self._file.name} or {self._board.logging_dir}: {reason}") from error

    def _report_thread(self, error: threading.ExceptHookArgs) -> None:
        # Not for TensorBoard's writer thread: the next write raises its error again.
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._excepthook(error)


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield the lines of a file with their records, up to one that was cut off by a kill or a power cut."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if record is None:
            return
        yield line, record
