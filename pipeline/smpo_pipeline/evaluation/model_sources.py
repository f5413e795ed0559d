"""The models to compare, as named on the command line, before anything is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smpo_common.errors import UserError
from smpo_common.files import files_below, sha256_file, sha256_json
from smpo_schemas.trained_model import LORA_FILE, METRICS_FILE, UNET_FOLDER

INDEX_FILE = "model_index.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_READ_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model")
_BESIDE_A_CHECKPOINT = (
    "*config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "model*.safetensors*",
    "pytorch_model*",
)
"""What a reward whose MODEL is a file may read beside it: configurations, a tokenizer, a CLIP."""


@dataclass(frozen=True)
class ModelSource:
    """One model of the comparison.

    Attributes:
        name: what tables and folders call it.
        source: folder or hub id, as it was given.
        kind: ``pipeline`` is whole; ``unet`` and ``lora`` are outputs of smpo-train, completed from a whole one.
    """

    name: str
    source: str
    kind: Literal["pipeline", "unet", "lora"]

    @property
    def metrics(self) -> Path | None:
        """The training run's metrics, where the folder holds them."""
        path = Path(self.source) / METRICS_FILE
        return path if path.is_file() else None

    @property
    def lora_file(self) -> Path:
        """The file of a ``lora``: the source itself, or in the folder that smpo-train left behind."""
        path = Path(self.source)
        return path if path.is_file() else path / LORA_FILE


def parse_models(specs: Sequence[str]) -> list[ModelSource]:
    """Read ``NAME=DIR_OR_ID`` specifications; the first one is the baseline.

    Raises:
        UserError: a malformed or repeated name, or a folder that is missing or holds no model.
    """
    models: list[ModelSource] = []
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or not source or not _NAME.fullmatch(name):
            raise UserError(
                f"--model {spec}: write NAME=DIR, for example tuned=runs/a; a name is made of letters, digits, . _ -"
            )
        if name in (model.name for model in models):
            raise UserError(f"--model {spec}: two models are called {name!r}; give each its own name")
        models.append(ModelSource(name, source, _kind(spec, source)))
    return models


def _kind(spec: str, source: str) -> Literal["pipeline", "unet", "lora"]:
    folder = Path(source)
    if not folder.exists() and _HUB_ID.fullmatch(source):
        return "pipeline"
    if folder.is_file() and folder.suffix == ".safetensors":
        return "lora"
    if not folder.is_dir():
        raise UserError(f"--model {spec}: {source} is neither a folder nor a LoRA file (.safetensors)")
    if (folder / INDEX_FILE).is_file():
        return "pipeline"
    if (folder / UNET_FOLDER / "config.json").is_file():
        return "unet"
    if (folder / LORA_FILE).is_file():
        return "lora"
    raise UserError(f"--model {spec}: {source} holds neither {INDEX_FILE}, {UNET_FOLDER}/config.json nor {LORA_FILE}")


def choose_base(models: Sequence[ModelSource], given: str | None) -> str | None:
    """The whole model that completes the ``unet`` and ``lora`` ones: the one given, else the first whole one.

    Raises:
        UserError: one is needed and there is none.
    """
    whole = [model.source for model in models if model.kind == "pipeline"]
    base = given or (whole[0] if whole else None)
    partial = [model for model in models if model.kind != "pipeline"]
    if partial and base is None:
        raise UserError(
            f"--model {partial[0].name}={partial[0].source} is an output of smpo-train without the rest of its model: "
            "name the model that it was trained from with --base"
        )
    return base if partial else None


def identity(model: ModelSource, base: str | None) -> str:
    """Hash of everything that ``model`` is loaded from; of a hub id, the id alone.

    It is taken from the files, so that a finished evaluation is recognised without loading a model.
    """
    folder = Path(model.source)
    if model.kind == "pipeline":
        return whole_identity(model.source)
    rest = whole_identity(base, without=UNET_FOLDER if model.kind == "unet" else None) if base else ""
    if model.kind == "lora":
        own = {LORA_FILE: sha256_file(model.lora_file)}
    else:
        own = _digest(folder, _model_files(folder / UNET_FOLDER))
    return sha256_json({"own": own, "rest": rest})


def whole_identity(source: str, without: str | None = None) -> str:
    """Hash of a model folder's files (leaving out one sub-folder), or the hub id itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in _READ_SUFFIXES]
    for part in _parts(folder):
        if part != without:
            files += _model_files(folder / part)
    return sha256_json(_digest(folder, files))


def reward_identity(spec: str) -> str:
    """Hash of the files behind the MODEL of ``NAME=MODEL``; a hub id itself; without a MODEL, the specification.

    Of a folder all files that are not hidden count, since a reward may be anybody's code. Code is not looked at.
    """
    model = spec.partition("=")[2]
    path = Path(model)
    if model and path.is_dir():
        return sha256_json(_digest(path, _files_below(path)))
    if path.is_file():
        beside = {each for pattern in _BESIDE_A_CHECKPOINT for each in path.parent.glob(pattern) if each.is_file()}
        return sha256_json(_digest(path.parent, [*{path, *beside}]))
    return model or spec


def _parts(folder: Path) -> list[str]:
    """Sub-folders that hold a pipeline's parts; a folder without an index has none."""
    index = folder / INDEX_FILE
    try:
        names = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    except ValueError as error:
        raise UserError(f"{index} is not a JSON file: {error}") from error
    return [name for name in names if (folder / name).is_dir()]


def _model_files(folder: Path) -> list[Path]:
    return [path for path in _files_below(folder) if path.suffix in _READ_SUFFIXES]


def _files_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if isinstance(path, Path) and path.is_file()]


def _digest(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(files)}
