"""Where a reward's files lie, and what is in a checkpoint file: for rewards whose models are no transformers folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from smpo_common.errors import UserError
from smpo_models.weights import loading_errors

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def find_checkpoint(model: str, what: str, ignore: Collection[str] = ()) -> Path:
    """The checkpoint file that ``model`` names: a file, a folder that holds one, or ``OWNER/REPO/FILE`` on the hub.

    Args:
        model: what the user gave.
        what: starts the error, for example ``--reward hpsv2=PATH``.
        ignore: file names of a folder that are weights of something else.

    Raises:
        UserError: there is none, or a folder holds several.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.name not in ignore)
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"{what}: the folder must hold one checkpoint ({' '.join(_SUFFIXES)}), found {names}")
        return found[0]
    return hub_file(model, what)


def hub_file(model: str, what: str) -> Path:
    """The local copy of ``OWNER/REPO/FILE``.

    Raises:
        UserError: the name is no such thing, or the file cannot be had.
    """
    owner, _, rest = model.partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and file):
        raise UserError(f"{what}: no such file or folder; a file on the hub is named OWNER/REPO/FILE")
    with loading_errors(what):
        return Path(hf_hub_download(f"{owner}/{repository}", file))


def read_checkpoint(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, in float32 and without the name that data parallel training puts before theirs.

    Nothing in the file is executed: safetensors, or tensors of a torch file loaded with ``weights_only``.

    Raises:
        UserError: the file is damaged, or holds anything but weights.
    """
    with loading_errors(f"{what}: {path}"):
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(name, str) and isinstance(each, torch.Tensor) for name, each in state.items()):
        raise UserError(f"{what}: {path} holds no weights by name (a state dict)")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in state.items()
    }
