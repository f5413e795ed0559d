"""Reward models, one file each; a new file here is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache

from smpo_pipeline.rewards.base import Needs, Reward
from smpo_schemas.errors import UserError

__all__ = ["Needs", "Reward", "load_reward", "parse_reward", "reward_classes"]


@cache
def reward_classes() -> dict[str, type[Reward]]:
    """Every reward by its name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {each.name: each for each in _leaves(Reward)}  # type: ignore[type-abstract]


def _leaves(parent: type[Reward]) -> Iterator[type[Reward]]:
    for child in parent.__subclasses__():
        if child.__subclasses__():
            yield from _leaves(child)
        else:
            yield child


def parse_reward(spec: str) -> tuple[type[Reward], str | None]:
    """Split ``NAME`` or ``NAME=MODEL`` into the reward's class and the model (None: its default).

    Raises:
        UserError: no reward has this name.
    """
    name, _, model = spec.partition("=")
    known = reward_classes()
    if name not in known:
        raise UserError(f"--reward {spec}: no reward is called {name!r}; known: {', '.join(sorted(known))}")
    return known[name], model or None


def load_reward(spec: str, device: str) -> Reward:
    """Load the reward that ``NAME`` or ``NAME=MODEL`` names.

    Raises:
        UserError: no such reward, or its weights cannot be loaded.
    """
    reward, model = parse_reward(spec)
    return reward(model, device)
