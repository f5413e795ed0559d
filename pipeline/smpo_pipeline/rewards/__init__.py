"""Reward models, one file each; a new file here is found by itself, a user's own class by where it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from smpo_common.commandline import nearest
from smpo_common.discovery import import_object, offered_by_packages
from smpo_common.errors import UserError
from smpo_models.hub import require_source
from smpo_pipeline.rewards.base import Needs, Reward, checked_scores

__all__ = ["Needs", "Reward", "check_reward", "checked_scores", "load_reward", "parse_reward", "reward_classes"]

_GROUP = "smpo.rewards"
_NUMBER = re.compile(r"[0-9.]+")
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


def check_reward(spec: str) -> str:
    """``spec``, if it can name a reward as :func:`parse_reward` reads it; nothing is imported for that.

    Raises:
        UserError: no reward has this name, or what follows it is no model.
    """
    name, equals, model = spec.partition("=")
    known = sorted({*_file_names(), *offered_by_packages(_GROUP)})
    if name not in known and (":" not in name or name.partition(":")[0] in known):
        raise UserError(f"--reward {spec}: {_no_reward(name, known)}")
    if equals and name in _file_names():  # what others take as their MODEL is theirs
        _check_model(spec, name, model)
    return spec


def _check_model(spec: str, name: str, model: str) -> None:
    if not model:
        raise UserError(f"--reward {spec}: no model follows; without the = it is the reward's own")
    if _NUMBER.fullmatch(model) and not Path(model).exists():
        raise UserError(f"--reward {spec}: {model} is no model; weights of rewards are smpo-train's ({name}:{model})")
    if model.count("/") < 2 or model.startswith(("/", ".")):  # noqa: PLR2004  (OWNER/REPO/FILE is looked for on the hub)
        require_source(model, f"--reward {spec}")


def _no_reward(name: str, known: Sequence[str]) -> str:
    """Why ``name`` is no reward's, and what may be meant."""
    if set(name.split(",")) <= {*known}:
        return f"one reward each: --reward {name.replace(',', ' ')}"
    if name.partition(":")[0] in known:
        return "weights of rewards are smpo-train's; here NAME or NAME=MODEL"
    meant = nearest(name, known)
    hint = f"did you mean {meant}? " if meant else ""
    return f"no reward is called {name!r}; {hint}known: {', '.join(known)}, or your own as MODULE:CLASS"


def _file_names() -> set[str]:
    """Names of this folder's rewards, by its files."""
    files = {file.name for file in pkgutil.iter_modules(__path__) if not file.name.startswith("_")}
    return {name.replace("_", "-") for name in files - {"base"}}


def parse_reward(spec: str) -> tuple[type[Reward], str | None]:
    """Split ``NAME``, ``NAME=MODEL``, ``MODULE:CLASS`` or ``MODULE:CLASS=MODEL`` into class and model (None: default).

    Raises:
        UserError: no reward has this name, or what has it is no reward; or what follows it is no model.
    """
    name, _, model = check_reward(spec).partition("=")
    if name in reward_classes():
        kind = reward_classes()[name]
    elif ":" in name:
        kind = _checked(import_object(name, "--reward"), f"--reward {spec}")
    else:
        kind = _checked(import_object(offered_by_packages(_GROUP)[name].value, "--reward"), f"--reward {spec}")
        if kind.name != name:
            raise UserError(f"--reward {spec}: the package's class calls itself {kind.name!r}; both names must agree")
    return kind, model or None


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
