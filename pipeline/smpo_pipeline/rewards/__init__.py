"""Reward models, one file each; a new file here is found by itself, a user's own class by where it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from smpo_pipeline.rewards.base import Needs, Reward, checked_scores
from smpo_schemas.errors import UserError

__all__ = ["Needs", "Reward", "checked_scores", "load_reward", "parse_reward", "reward_classes"]

_GROUP = "smpo.rewards"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@cache
def reward_classes() -> dict[str, type[Reward]]:
    """Every reward of this folder by its name."""
    found = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for each in vars(module).values():
            # Bases that several rewards share have no name.
            if inspect.isclass(each) and issubclass(each, Reward) and "name" in vars(each):
                found[each.name] = each
    return found


def _entry_points() -> dict[str, EntryPoint]:
    """Rewards that installed packages offer, not loaded."""
    return {point.name: point for point in entry_points(group=_GROUP)}


def parse_reward(spec: str) -> tuple[type[Reward], str | None]:
    """Split ``NAME``, ``NAME=MODEL``, ``MODULE:CLASS`` or ``MODULE:CLASS=MODEL`` into class and model (None: default).

    Raises:
        UserError: no reward has this name, or what has it is no reward.
    """
    name, _, model = spec.partition("=")
    offered = _entry_points()
    if name in reward_classes():
        kind = reward_classes()[name]
    elif "," in name:
        raise UserError(f"--reward {spec}: several rewards are written --reward {' '.join(spec.split(','))}")
    elif name.partition(":")[0] in reward_classes():
        raise UserError(f"--reward {spec}: write --reward {name.partition(':')[0]}; weights are for smpo-train")
    elif ":" in name:
        kind = _checked(_import(name), f"--reward {spec}")
    elif name in offered:
        kind = _checked(_import(offered[name].value), f"--reward {spec}")
        if kind.name != name:
            raise UserError(f"--reward {spec}: the package's class calls itself {kind.name!r}; both names must agree")
    else:
        known = ", ".join(sorted({*reward_classes(), *offered}))
        raise UserError(f"--reward {spec}: no reward is called {name!r}; known: {known}, or your own as MODULE:CLASS")
    return kind, model or None


def _import(place: str) -> object:
    """What ``MODULE:CLASS`` names; modules beside which the command was started are found too.

    Raises:
        UserError: there is no such module or class.
    """
    module_name, _, class_name = place.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"--reward {place}: {module_name!r} is no module's name, such as my_rewards or package.module")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise UserError(f"--reward {place}: {module_name} cannot be imported: {error}") from error
    if not hasattr(module, class_name):
        raise UserError(f"--reward {place}: {getattr(module, '__file__', None) or module_name} has no {class_name!r}")
    return getattr(module, class_name)


def _checked(kind: object, what: str) -> type[Reward]:
    """``kind``, if it is a reward that a scores table can hold.

    Raises:
        UserError: it is not.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Reward)):
        raise UserError(f"{what} is no subclass of smpo_pipeline.rewards.Reward")
    lacking = [each for each in ("name", "unit") if not isinstance(getattr(kind, each, None), str)]
    lacking += sorted(kind.__abstractmethods__)
    if lacking:
        raise UserError(f"{what}: the class does not define {', '.join(lacking)}")
    if not _NAME.fullmatch(kind.name):
        raise UserError(f"{what}: the name {kind.name!r} cannot be a column; use letters, digits, '-', '_' and '.'")
    if reward_classes().get(kind.name, kind) is not kind:
        raise UserError(f"{what}: the name {kind.name!r} is that of a reward of this program; give it its own")
    return kind


def load_reward(spec: str, device: str) -> Reward:
    """Load the reward that ``spec`` names, see :func:`parse_reward`.

    Raises:
        UserError: no such reward, its weights cannot be loaded, or it does not say what was loaded.
    """
    kind, model = parse_reward(spec)
    reward = kind(model, device)
    for attribute in ("model", "fingerprint"):
        value = getattr(reward, attribute, None)
        if not (isinstance(value, str) and value):
            raise UserError(f"--reward {spec}: its constructor must set self.{attribute} to a text; it is {value!r}")
    return reward
