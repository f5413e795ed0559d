"""The model that images are sampled with: a whole pipeline, or an output of smpo-train with its base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smpo_common.errors import UserError
from smpo_schemas.choices import SamplerChoice
from smpo_schemas.trained_model import DENOISER_FOLDERS, LORA_FILE, METRICS_FILE

INDEX_FILE = "model_index.json"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Kind = Literal["pipeline", "denoiser", "lora"]


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
    kind: Kind
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


@dataclass(frozen=True)
class Loading:
    """What a model is loaded from for sampling.

    Attributes:
        source: the model.
        base: folder or hub id of the whole model that completes it; None for a whole one.
        variant: of the files of weights; None: those without a variant, or the only one.
        sampler: as ``--sampler`` names it.
    """

    source: ModelSource
    base: str | None
    variant: str | None
    sampler: SamplerChoice


def recognise_source(given: str, source: str) -> Kind:
    """Tell whole models and outputs of smpo-train apart by their files; ``given`` names the source in errors.

    Raises:
        UserError: it is missing, or holds no model.
    """
    folder = Path(source)
    if not folder.exists() and _HUB_ID.fullmatch(source):
        return "pipeline"
    if folder.is_file() and folder.suffix == ".safetensors":
        return "lora"
    if not folder.is_dir():
        raise UserError(f"{given}: {source} is neither a folder nor a LoRA file (.safetensors)")
    if (folder / INDEX_FILE).is_file():
        return "pipeline"
    if find_denoiser(folder):
        return "denoiser"
    if (folder / LORA_FILE).is_file():
        return "lora"
    raise UserError(
        f"{given}: {source} is neither a pipeline ({INDEX_FILE}) nor an output of smpo-train "
        f"({', '.join(f'{name}/config.json' for name in DENOISER_FOLDERS)} or {LORA_FILE})"
    )


def find_denoiser(folder: Path) -> str | None:
    """Return the name of the subfolder with a denoiser, or None."""
    return next((name for name in DENOISER_FOLDERS if (folder / name / "config.json").is_file()), None)
