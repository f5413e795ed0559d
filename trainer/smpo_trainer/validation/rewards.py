"""The mean reward of the validation images (``--validation-reward``).

A program of the pipeline scores them in a separate process, which ends after each time, so that no reward model takes
memory during training.
"""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from PIL import Image

from smpo_common.errors import UserError

_PACKAGE = "smpo_pipeline"
_PROGRAM = f"{_PACKAGE}.score_images"


def require_reward(spec: str) -> None:
    """Check that a reward of this name can be asked for, without loading it.

    Raises:
        UserError: it cannot.
    """
    if find_spec(_PACKAGE) is None:
        raise UserError(
            f"--validation-reward {spec} needs the pipeline's reward models: pip install 'smpo-diffusion[pipeline]'"
        )
    _run(spec, "check", "")


def mean_reward(spec: str, images: Sequence[np.ndarray], prompts: Sequence[str], device: str) -> float:
    """Score images and return the mean of the scores.

    Args:
        spec: NAME or NAME=MODEL, as for ``score --reward``.
        images: uint8 [H, W, 3] each.
        prompts: prompts of the images.
        device: ``cpu`` or ``cuda``.

    Raises:
        UserError: the reward fails, or gives an image no score.
    """
    lines = [json.dumps({"prompt": p, "png": _png(image)}) for p, image in zip(prompts, images, strict=True)]
    scores = _run(spec, device, "\n".join(lines))
    known = [score for score in scores if score is not None]
    if len(known) != len(images):
        raise UserError(f"--validation-reward {spec}: {len(known)} of {len(images)} validation images have a score")
    return float(np.mean(known))


def _png(image_HW3: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _run(spec: str, device: str, lines: str) -> list[float | None]:
    command = [sys.executable, "-m", _PROGRAM, spec, device]
    # In a session of its own: Ctrl-C reaches all processes of a terminal, but the trainer still finishes its step.
    done = subprocess.run(  # noqa: S603  (a program of our own)
        command, input=lines, capture_output=True, text=True, check=False, start_new_session=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise UserError(f"--validation-reward {spec}: {said[-1] if said else f'it ended with {done.returncode}'}")
    scores: list[float | None] = json.loads(done.stdout.strip().splitlines()[-1])
    return scores
