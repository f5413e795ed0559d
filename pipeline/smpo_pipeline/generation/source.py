"""The model that images are sampled with: a whole pipeline, or an output of smpo-train with its base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smpo_common.errors import UserError
from smpo_common.files import read_json
from smpo_schemas.choices import SamplerChoice
from smpo_schemas.trained_model import DENOISER_FOLDERS, LORA_FILE, METRICS_FILE

INDEX_FILE = "model_index.json"

_CONFIG_FILE = "config.json"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_LORA = re.compile(r"[\w-][\w.-]*/[\w.-]+/[\w./ -]+\.safetensors")

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
        downloaded: where the files of a denoiser or a LoRA on the hub lie.
    """

    name: str
    source: str
    kind: Kind
    flag: str | None = None
    negative: ModelSource | None = None
    downloaded: Path | None = None

    @property
    def named(self) -> str:
        """The model's name in errors."""
        return self.flag or f"--model {self.name}={self.source}"

    @property
    def path(self) -> Path:
        """Its folder or file; of a whole model on the hub a path that does not exist."""
        return self.downloaded or Path(self.source)

    @property
    def denoiser(self) -> Path | None:
        """The folder of a ``denoiser``, or the one that has it as a subfolder."""
        return self.path if self.kind == "denoiser" else None

    @property
    def metrics(self) -> Path | None:
        """The training run's metrics file, if the folder has one."""
        path = self.path / METRICS_FILE
        return path if path.is_file() else None

    @property
    def lora_file(self) -> Path:
        """The file of a ``lora``: the source itself, or in smpo-train's output folder."""
        return self.path if self.path.is_file() else self.path / LORA_FILE


@dataclass(frozen=True)
class Loading:
    """What a model is loaded from for sampling.

    Attributes:
        source: the model.
        base: folder or hub id of the whole model that completes it or its negative model; None if both are whole.
        variant: of the files of weights; None: those without a variant, or the only one.
        sampler: as ``--sampler`` names it.
    """

    source: ModelSource
    base: str | None
    variant: str | None
    sampler: SamplerChoice


def find_source(
    name: str, given: str, source: str, *, flag: str | None = None, negative: ModelSource | None = None
) -> ModelSource:
    """Tell whole models, denoisers and LoRAs apart by their files.

    Args:
        name: see :class:`ModelSource`.
        given: names the source in errors.
        source: folder, file, hub id, or ``OWNER/NAME/FILE.safetensors`` on the hub.
        flag: see :class:`ModelSource`.
        negative: see :class:`ModelSource`.

    Raises:
        UserError: it is missing, or holds no model.
    """
    downloaded = None
    if not Path(source).exists() and (_HUB_ID.fullmatch(source) or _HUB_LORA.fullmatch(source)):
        from smpo_pipeline.generation.hub_models import find_on_hub  # noqa: PLC0415  (keeps --help quick)

        kind, downloaded = find_on_hub(given, source)
    else:
        kind = _kind_of(given, Path(source))
    return ModelSource(name, source, kind, flag, negative, downloaded)


def _kind_of(given: str, folder: Path) -> Kind:
    if folder.is_file() and folder.suffix == ".safetensors":
        return "lora"
    if not folder.is_dir():
        raise UserError(f"{given}: {folder} is neither a folder nor a LoRA file (.safetensors)")
    if (folder / INDEX_FILE).is_file():
        return "pipeline"
    if find_denoiser(folder):
        return "denoiser"
    if (folder / LORA_FILE).is_file():
        return "lora"
    raise UserError(
        f"{given}: {folder} is neither a pipeline ({INDEX_FILE}) nor a denoiser or a LoRA, such as an output of "
        f"smpo-train ({', '.join(f'{name}/config.json' for name in DENOISER_FOLDERS)}, config.json or {LORA_FILE})"
    )


def find_denoiser(folder: Path) -> tuple[Path, str] | None:
    """Find a denoiser: in a subfolder, or the folder itself.

    Returns:
        Its folder, and the subfolder of a whole model that it replaces; None if there is none.
    """
    for name in DENOISER_FOLDERS:
        if (folder / name / _CONFIG_FILE).is_file():
            return folder / name, name
    if (folder / _CONFIG_FILE).is_file():
        unet, transformer = DENOISER_FOLDERS
        kind = str(read_json(folder / _CONFIG_FILE).get("_class_name", ""))
        if kind.startswith("UNet2D"):
            return folder, unet
        if "Transformer2D" in kind:
            return folder, transformer
    return None
