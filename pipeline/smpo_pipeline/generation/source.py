"""The model that images are sampled with: a whole pipeline, or an output of smpo-train with its base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smpo_schemas.trained_model import LORA_FILE, METRICS_FILE


@dataclass(frozen=True)
class ModelSource:
    """One model.

    Attributes:
        name: its name in tables and folders.
        source: folder, file or hub id, as the user gave it.
        kind: ``pipeline`` is a whole model; ``denoiser`` and ``lora`` are outputs of smpo-train, which need a base.
        flag: names it in errors; default: ``--model NAME=SOURCE``.
        negative: the model that predicts for the unconditional prompt in its place.
    """

    name: str
    source: str
    kind: Literal["pipeline", "denoiser", "lora"]
    flag: str | None = None
    negative: ModelSource | None = None

    @property
    def named(self) -> str:
        """The model's name in errors."""
        return self.flag or f"--model {self.name}={self.source}"

    @property
    def metrics(self) -> Path | None:
        """The training run's metrics file, if the folder has one."""
        path = Path(self.source) / METRICS_FILE
        return path if path.is_file() else None

    @property
    def lora_file(self) -> Path:
        """The file of a ``lora``: the source itself, or in smpo-train's output folder."""
        path = Path(self.source)
        return path if path.is_file() else path / LORA_FILE
