"""What is logged of a step, in a Weights & Biases project (``--wandb-project``)."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smpo_common.errors import UserError
from smpo_common.files import write_bytes

WANDB_FOLDER = "wandb"


class WandbLog:
    """One run there; a run that goes on here goes on there."""

    def __init__(self, project: str, out: Path, identity: Mapping[str, Any]) -> None:
        """Begin it, or go on with it.

        Args:
            project: its name.
            out: output folder of the run; its name is the run's.
            identity: the settings that decide the run's numbers, shown as its configuration.

        Raises:
            UserError: wandb is not installed, or takes no run.
        """
        wandb = import_wandb(project)
        try:
            self._run = wandb.init(
                project=project,
                name=out.name,
                id=_run_id(out),
                resume="allow",
                dir=str(out),
                config=dict(identity),
            )
        except wandb.Error as error:
            raise UserError(f"--wandb-project {project}: {error}") from error

    def write(self, values: Mapping[str, float | None]) -> None:
        """Log one step."""
        have = {name: value for name, value in values.items() if value is not None and name != "step"}
        self._run.log(have, step=values["step"])

    def close(self) -> None:
        """End it."""
        self._run.finish()


def _run_id(out: Path) -> str:
    """Of the run that this folder holds: kept, so that a run that goes on finds it, until the folder is cleared."""
    path = out / WANDB_FOLDER / "run_id"
    if not path.is_file():
        write_bytes(path, uuid.uuid4().hex.encode())
    return path.read_text()


def import_wandb(project: str) -> Any:  # noqa: ANN401  (an optional module)
    """The module.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb-project {project} needs wandb, which is not installed: pip install wandb, or leave the flag out "
            "(TensorBoard files and metrics.jsonl are written anyway)"
        ) from error
