"""What is logged of a step: means over the effective batch, as JSON lines and by accelerate's trackers."""

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

Record = dict[str, float | int | None]
"""One step's values by name; None where no pair of the step had such a value, or it is not finite."""


def plain(record: Record) -> Record:
    """The same with None for what is not finite, which JSON cannot hold."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}


class StepMeter:
    """Sums of per-pair values over a step's micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take a micro-batch's per-pair values, each [B]; NaN where a pair has none."""
        for name, value_B in values.items():
            have_B = ~value_B.isnan()
            # float64: the mean must not depend on how the effective batch was cut.
            pair = torch.stack([value_B.double().where(have_B, 0).sum(), have_B.double().sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> Record:
        """Mean by name, over all processes."""
        names = sorted(self._sums)
        sums_N2 = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return {
            name: total / count if count else None for name, (total, count) in zip(names, sums_N2.tolist(), strict=True)
        }


class MetricsLog:
    """``metrics.jsonl`` (one object a step) of one run, TensorBoard's files, and its run at Weights & Biases.

    Attributes:
        earlier: the records of the steps that were finished before.
    """

    def __init__(self, out: Path, finished_steps: int, wandb: WandBTracker | None = None) -> None:
        """Open for appending, after dropping what was logged beyond ``finished_steps`` by a run that was killed."""
        self._wandb = wandb
        path = out / METRICS_FILE
        kept = {line: record for line, record in _records(path) if (record["step"] or 0) <= finished_steps}
        self.earlier: list[Record] = list(kept.values())
        write_bytes(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._before, threading.excepthook = threading.excepthook, self._report_thread
        self._board = start_tensorboard(out, finished_steps)

    def write(self, record: Record) -> None:
        """Append one step; it has left this process on return.

        Raises:
            UserError: the file cannot be written.
        """
        step = record["step"]
        values = {name: value for name, value in record.items() if value is not None and name != "step"}
        with self._writing():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            self._board.log({name if "/" in name else f"train/{name}": value for name, value in values.items()}, step)
        if self._wandb:
            self._wandb.log(values, step)

    def sync(self) -> None:
        """Have all steps survive a power cut, as a checkpoint of them will.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            os.fsync(self._file.fileno())

    def draw(self, step: int, image_HW3: np.ndarray) -> None:
        """Show an image, uint8 [H, W, 3], in TensorBoard and Weights & Biases.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            self._board.log_images({"validation": image_HW3[None]}, step, dataformats="NHWC")
        if self._wandb:
            self._wandb.log_images({"validation": [image_HW3]}, step)

    def close(self) -> None:
        """Close all of them.

        Raises:
            UserError: what was yet to be written cannot be.
        """
        with ExitStack() as stack:
            stack.callback(setattr, threading, "excepthook", self._before)
            if self._wandb:
                stack.callback(self._wandb.finish)
            stack.enter_context(self._writing())
            stack.callback(self._board.finish)
            stack.callback(self._file.close)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # of TensorBoard's files too
            reason = error.strerror or error
            raise UserError(f"cannot write {self._file.name} or {self._board.logging_dir}: {reason}") from error

    def _report_thread(self, given: threading.ExceptHookArgs) -> None:
        """Print the traceback of a thread, but not of TensorBoard's, whose error the next write to it raises again."""
        if not type(given.thread).__module__.startswith("tensorboard."):
            self._before(given)


def _records(path: Path) -> Iterator[tuple[bytes, Record]]:
    """The lines of a file and what they say, up to where one is broken off: a kill, or a power cut, came in between."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            return
        if record is None:
            return
        yield line, record
