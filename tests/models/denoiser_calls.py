"""What a pipeline gives to its denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_SWITCHES = ("return_dict", "attention_kwargs", "joint_attention_kwargs")


class Calls:
    """Records what a denoiser is given, by name, and its output, at each forward."""

    def __init__(self, denoiser: torch.nn.Module, positional: Sequence[str] = ()) -> None:
        self.given: list[dict[str, Any]] = []
        self.output: list[Any] = []
        self._positional = positional
        denoiser.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, _module, args, kwargs, output) -> None:
        named = dict(zip(self._positional, args, strict=False)) | kwargs
        assert len(named) == len(args) + len(kwargs)
        self.given.append({name: value for name, value in named.items() if value is not None and name not in _SWITCHES})
        self.output.append(output[0])
