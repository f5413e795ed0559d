"""How a model was trained, from the ``training.json`` of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_common.files import read_json
from smpo_schemas.trained_model import TRAINING_FILE

_SETTINGS = ("beta", "gamma", "lr", "optimizer", "lora_rank", "seed")
"""Settings of a run that are shown, besides objective, steps and data."""


def read_training(source: str) -> tuple[dict[str, str | int | float | bool | None], list[str]]:
    """Read how a model was trained.

    Args:
        source: an output of smpo-train, one of its checkpoints, or a LoRA file in one of them.

    Returns:
        Settings and data by name, in the order to show them, and the names of the rewards of the preference that it
        learned from; both empty where there is no finished run.

    Raises:
        UserError: the file is not one of smpo-train.
    """
    path = _training_file(Path(source))
    if path is None:
        return {}, []
    record = read_json(path)
    try:
        return _shown(record), list(record["rewards"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a record of smpo-train: {error!r}") from error


def _training_file(path: Path) -> Path | None:
    folders = [path.parent if path.is_file() else path]
    # A checkpoint lies in its run's folder.
    folders.append(folders[0].absolute().parent)
    return next((folder / TRAINING_FILE for folder in folders if (folder / TRAINING_FILE).is_file()), None)


def _shown(record: dict[str, Any]) -> dict[str, str | int | float | bool | None]:
    settings = record["settings"]
    rewards = ", ".join(f"{name}:{reward['weight']:g}" for name, reward in record["rewards"].items())
    shown = {
        "model": record["model"],
        "objective": record["objective"],
        "rewards": rewards or None,
        **{name: settings.get(name) for name in _SETTINGS},
        "steps": record["steps"],
        "states per step": record["states_per_step"],
        "epochs": record["epochs"],
        "shards": ", ".join(shards["path"] for shards in record["shards"]),
        "version": record["versions"].get("smpo-diffusion"),
    }
    return {name: value for name, value in shown.items() if value is not None}
