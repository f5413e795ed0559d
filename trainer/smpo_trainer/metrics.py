"""What is logged of a step: means over the effective batch, as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from smpo_schemas.errors import UserError
from smpo_schemas.files import write_bytes

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Record = dict[str, float | int | None]
"""One step's values by name; None where no pair of the step had such a value."""


class StepMeter:
    """Sums of per-pair values over a step's micro-batches and processes."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take a micro-batch's per-pair values, each [B]; NaN where a pair has none."""
        for name, value_B in values.items():
            have_B = ~value_B.isnan()
            # float64: the mean must not depend on how the effective batch was cut.
            pair = torch.stack([value_B.nan_to_num(nan=0.0).double().sum(), have_B.double().sum()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator: Accelerator) -> Record:
        """Mean by name, over all processes."""
        names = sorted(self._sums)
        sums_N2 = accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
        return {
            name: total / count if count else None for name, (total, count) in zip(names, sums_N2.tolist(), strict=True)
        }


class MetricsLog:
    """``metrics.jsonl`` (one object a step) and TensorBoard files of one run."""

    def __init__(self, out: Path, finished_steps: int) -> None:
        """Open for appending, after dropping what was logged beyond ``finished_steps`` by a run that was killed."""
        path = out / METRICS_FILE
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= finished_steps]
        write_bytes(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / TENSORBOARD_FOLDER), purge_step=finished_steps + 1)

    def write(self, record: Record) -> None:
        """Append one step; it has left this process on return.

        Raises:
            UserError: the file cannot be written.
        """
        plain = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
        try:
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self._file.name}: {error.strerror}") from error
        for name, value in plain.items():
            if value is not None and name != "step":
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, plain["step"])

    def close(self) -> None:
        """Close both."""
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that end; a process killed while writing leaves half a line."""
    if not path.is_file():
        return []
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
