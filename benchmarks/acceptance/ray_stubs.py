"""Stand-ins for three of Ray's modules if it is not installed; the checks call actors without Ray."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def install_ray_stubs() -> bool:
    """Make ``import ray`` work; returns whether it had to be stubbed.

    They contain the names that our modules need on import, and a ``get`` that returns its argument.
    """
    if importlib.util.find_spec("ray"):
        return False
    ray, data, exceptions = (ModuleType(name) for name in ("ray", "ray.data", "ray.exceptions"))
    for module, names in ((ray, ["ObjectRef"]), (data, ["Dataset"]), (exceptions, ["RayError", "RayTaskError"])):
        for name in names:
            setattr(module, name, type(name, (Exception,), {}))
    ray.data, ray.exceptions, ray.get = data, exceptions, lambda value: value
    sys.modules |= {module.__name__: module for module in (ray, data, exceptions)}
    return True
