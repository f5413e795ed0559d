"""Reward models, one file each, and how ``--reward`` finds them, including a user's own classes."""

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
from smpo_pipeline.rewards.base import Needs, Reward, Scored, checked_scores
from smpo_schemas.scoring.scores import REWARD_NAME

__all__ = [
    "Needs",
    "Reward",
    "Scored",
    "check_reward",
    "checked_scores",
    "load_reward",
    "parse_reward",
    "reward_classes",
]

_GROUP = "smpo.rewards"
_NUMBER = re.compile(r"[0-9.]+")
_SERVED = ("http", "judge")
"""Rewards whose MODEL is the address of a server."""


@cache
def reward_classes() -> dict[str, type[Reward]]:
    """Import the rewards of this folder, by name."""
    classes = {}
    for file in _files():
        module = importlib.import_module(f"{__name__}.{file}")
        for item in vars(module).values():
            # Base classes that rewards share have no name.
            if inspect.isclass(item) and issubclass(item, Reward) and "name" in vars(item):
                classes[item.name] = item
    return classes


def check_reward(spec: str) -> str:
    """Check the form of a value of ``--reward`` (see :func:`parse_reward`) and return it, without importing rewards.

    Raises:
        UserError: there is no reward of this name, or the model is not a file, folder or hub id.
    """
    name, equals, model = spec.partition("=")
    known = sorted({*_file_names(), *offered_by_packages(_GROUP)})
    if name not in known and (":" not in name or name.partition(":")[0] in known):
        raise UserError(f"--reward {spec}: {_no_reward(name, known)}")
    if equals and name in _file_names() - {*_SERVED}:  # a user's own reward decides what its MODEL may be
        _check_model(spec, name, model)
    return spec


def _check_model(spec: str, name: str, model: str) -> None:
    if not model:
        raise UserError(f"--reward {spec}: the model is missing; give a model after =, or leave out = for the default")
    if _NUMBER.fullmatch(model) and not Path(model).exists():
        raise UserError(
            f"--reward {spec}: {model} is not a model; give reward weights to smpo-train, as --reward {name}:{model}"
        )
    if model.count("/") < 2 or model.startswith(("/", ".")):  # noqa: PLR2004  (OWNER/REPO/FILE is a hub file)
        require_source(model, f"--reward {spec}")


def _no_reward(name: str, known: Sequence[str]) -> str:
    """Describe why there is no such reward and what the user may mean."""
    if set(name.split(",")) <= {*known}:
        return f"separate rewards by spaces: --reward {name.replace(',', ' ')}"
    if name.partition(":")[0] in known:
        return "give NAME or NAME=MODEL; NAME:WEIGHT is for smpo-train"
    meant = nearest(name, known)
    hint = f"did you mean {meant}? " if meant else ""
    return f"there is no reward {name!r}; {hint}known: {', '.join(known)}, or your own as MODULE:CLASS"


def _files() -> set[str]:
    """List this folder's modules with a reward; those that rewards share are in a folder of their own."""
    return {file.name for file in pkgutil.iter_modules(__path__) if not file.ispkg} - {"base"}


def _file_names() -> set[str]:
    """List the names of this folder's rewards by their files, without importing them."""
    return {name.replace("_", "-") for name in _files()}


def parse_reward(spec: str) -> tuple[type[Reward], str | None]:
    """Split ``NAME``, ``NAME=MODEL``, ``MODULE:CLASS`` or ``MODULE:CLASS=MODEL`` into class and model (None: default).

    Built-in rewards are imported only for a ``NAME``: a ``MODULE:CLASS`` may run where their libraries are missing.

    Raises:
        UserError: there is no such reward, its class is unusable, or the model is not a file, folder or hub id.
    """
    name, _, model = check_reward(spec).partition("=")
    if name in _file_names():
        kind = reward_classes()[name]
    elif ":" in name:
        kind = _checked(import_object(name, "--reward"), f"--reward {spec}")
    else:
        kind = _checked(import_object(offered_by_packages(_GROUP)[name].value, "--reward"), f"--reward {spec}")
        if kind.name != name:
            raise UserError(
                f"--reward {spec}: the class of this entry point has the name {kind.name!r}; both names must agree"
            )
    return kind.named_by(model or None), model or None


def _checked(kind: object, what: str) -> type[Reward]:
    """Check that a class is a complete reward whose name can be a column of the scores table.

    Raises:
        UserError: it is not such a class.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Reward)):
        raise UserError(f"{what} is not a subclass of smpo_pipeline.rewards.Reward")
    missing = [attribute for attribute in ("name", "unit") if not isinstance(getattr(kind, attribute, None), str)]
    missing += sorted(kind.__abstractmethods__)
    if missing:
        raise UserError(f"{what}: the class does not define {', '.join(missing)}")
    if not re.fullmatch(REWARD_NAME, kind.name):
        raise UserError(f"{what}: the name {kind.name!r} cannot be a column; use letters, digits, '-', '_' and '.'")
    if kind.name in _file_names() and not kind.__module__.startswith(f"{__name__}."):
        raise UserError(f"{what}: a built-in reward has the name {kind.name!r}; choose another name")
    return kind


def load_reward(spec: str, device: str) -> Reward:
    """Load a reward, see :func:`parse_reward`.

    Raises:
        UserError: there is no such reward, its weights cannot be loaded, or its constructor sets no ``model`` or
            ``fingerprint``.
    """
    kind, model = parse_reward(spec)
    reward = kind(model, device)
    for attribute in ("model", "fingerprint"):
        value = getattr(reward, attribute, None)
        if not (isinstance(value, str) and value):
            raise UserError(f"--reward {spec}: its constructor must set self.{attribute} to a string; it is {value!r}")
    return reward
