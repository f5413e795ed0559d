"""Trackers of a run: TensorBoard, and Weights & Biases (``--wandb-project``)."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker, WandBTracker

from smpo_common.errors import UserError
from smpo_common.files import write_bytes

TENSORBOARD_FOLDER, WANDB_FOLDER = "tensorboard", "wandb"


def start_tensorboard(out: Path, finished_steps: int) -> TensorBoardTracker:
    """Start event files in ``out``, and hide events beyond ``finished_steps`` in earlier files."""
    tracker = TensorBoardTracker(TENSORBOARD_FOLDER, out, purge_step=finished_steps and finished_steps + 1)
    tracker.start()
    return tracker


def start_wandb(project: str, out: Path, identity: Mapping[str, Any]) -> WandBTracker:
    """Start or resume the Weights & Biases run of an output folder.

    Args:
        project: name of the project.
        out: output folder; its name becomes the name of the run.
        identity: settings that decide the results, shown as configuration.

    Raises:
        UserError: wandb is not installed, or refuses the run.
    """
    wandb = import_wandb(project)
    tracker = WandBTracker(project, name=out.name, id=_run_id(out), resume="allow", dir=str(out), config=dict(identity))
    try:
        tracker.start()
    except wandb.Error as error:
        raise UserError(f"--wandb-project {project}: {error}") from error
    return tracker


def _run_id(out: Path) -> str:
    """Return the id of the folder's run, stored in the folder so that a resumed run continues it."""
    path = out / WANDB_FOLDER / "run_id"
    if not path.is_file():
        write_bytes(path, uuid.uuid4().hex.encode())
    return path.read_text()


def import_wandb(project: str) -> Any:  # noqa: ANN401  (an optional module)
    """Import wandb.

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
