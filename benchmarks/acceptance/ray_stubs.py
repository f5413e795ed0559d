"""Three modules in the place of Ray where it is not installed: the actors are called without it."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def install_ray_stubs() -> bool:
    """Make ``import ray`` work; returns whether it had to be stubbed.

    What is there is what our modules name while they are imported, and ``get``, which gives back what it is given.
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
