from __future__ import annotations

import sys

import torch
from torchvision.transforms.functional import resize

from tests import torchvision_beside_cpu_torch as hook


def test_torchvision_works_here():
    """In this environment by the hook, if torch is the CPU build; the operators are known either way."""
    assert resize(torch.zeros(3, 4, 4), [2, 2]).shape == (3, 2, 2)
    assert hasattr(torch.ops.torchvision, "nms")


def test_it_does_nothing_where_the_operators_are_known():
    try:
        assert hook._Finder.find_spec("torchvision._meta_registrations") is None
        assert hook._kept == []
    finally:
        sys.meta_path.remove(hook._Finder)
