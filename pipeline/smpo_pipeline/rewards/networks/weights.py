"""Find and read checkpoint files, for rewards whose models are not transformers folders."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file

from smpo_common.errors import UserError
from smpo_common.files import sha256_file, sha256_json
from smpo_models.hub import require_source
from smpo_models.weights import loading_errors

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


def find_checkpoint(model: str, what: str, ignore: Collection[str] = ()) -> Path:
    """Find a checkpoint file.

    Args:
        model: a file, a folder that holds one checkpoint, or ``OWNER/REPO/FILE`` on the hub.
        what: starts the error message, for example ``--reward hpsv2=PATH``.
        ignore: file names in the folder that are other weights.

    Raises:
        UserError: there is none, or a folder holds several.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name not in ignore)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{what}: the folder must hold one checkpoint ({' '.join(_SUFFIXES)}), found {names}")
        return files[0]
    return hub_file(model, what)


def hub_file(model: str, what: str) -> Path:
    """Download ``OWNER/REPO/FILE`` from the hub, or find it in the local cache.

    Raises:
        UserError: the name has another form, or the file cannot be downloaded.
    """
    owner, _, rest = model.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and file):
        raise UserError(f"{what}: no such file or folder; a file on the hub is named OWNER/REPO/FILE")
    with loading_errors(what):
        return Path(hf_hub_download(f"{owner}/{repository}", file))


def read_checkpoint(path: Path, what: str) -> dict[str, torch.Tensor]:
    """Read a checkpoint's weights in float32, without the ``module.`` prefix of data parallel training.

    No code in the file is executed: torch files are loaded with ``weights_only``.

    Raises:
        UserError: the file is damaged, or is not a state dict.
    """
    with loading_errors(f"{what}: {path}"):
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UserError(f"{what}: {path} is not a state dict (weights by name)")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }


def model_folder(model: str, what: str) -> Path:
    """Return the folder of a transformers model: its own, or that of its download, weights included.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    if Path(model).is_dir():
        return Path(model)
    require_source(model, what)
    with loading_errors(what):
        return Path(snapshot_download(model, allow_patterns=list(_MODEL_FILES)))


def fingerprint_folder(folder: Path) -> str:
    """Hash the files of a transformers model: weights, configurations, tokenizer.

    Unlike :func:`smpo_models.fingerprint.fingerprint_module` it reads no weights into memory; the same weights in other
    files have another fingerprint.

    Raises:
        UserError: there are no safetensors.
    """
    files = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{folder} has no *.safetensors")
    return sha256_json({file.name: sha256_file(file) for file in files})
