"""Hashes of weights, so that shards and models that do not belong together are never used together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


def fingerprint_module(*modules: nn.Module) -> str:
    """Return the hex SHA-256 over the names, shapes and float32 values of all parameters and buffers, in name order.

    The same weights stored as float16, bfloat16 or float32, in one file or several, have one fingerprint; hash before
    casting to a narrower type.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name}{list(tensor.shape)}".encode())
            values = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
            digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def settings_of(module: Any) -> dict[str, Any]:  # noqa: ANN401  (diffusers has no types)
    """Return what a diffusers module's output depends on besides its weights: its config, as plain JSON values.

    Left out are private entries, which describe the file it came from, and defaults, which newer versions add to.
    """
    # Compared when `invert` continues a run; the manifest holds fingerprints only.
    config = module.config
    given = {name: value for name, value in config.items() if name not in config.get("_use_default_values", ())}
    return json.loads(json.dumps({name: value for name, value in given.items() if not name.startswith("_")}))
