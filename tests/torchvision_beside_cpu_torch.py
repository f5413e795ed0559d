"""Lets a CUDA build of torchvision be imported beside a CPU build of torch. For development only.

The package registry has torchvision for CUDA alone. Beside a CPU torch its compiled operators cannot be loaded, and
its import fails where their Python side refers to ``nms``; then that of diffusers fails too. Declaring the two
operators, without an implementation, is enough for transforms. Where torchvision's own were loaded, this does nothing.

``make setup`` copies this file into .venv with a .pth file that imports it at every start of Python there, so that
Ray's workers have it as well.
"""

from __future__ import annotations

import sys
from typing import Any

_kept: list[Any] = []


class _Finder:
    """Finds nothing, but sees what is imported: this module is the first that needs the operators."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG004
        if name != "torchvision._meta_registrations":
            return
        import torch

        if not hasattr(torch.ops.torchvision, "nms"):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)  # its declarations go when it does


sys.meta_path.insert(0, _Finder)
