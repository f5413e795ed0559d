"""What a reward model is to this project, and how one is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from smpo_common.errors import UserError

_SHOWN = 200
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Needs:
    """What one actor of a reward takes of a machine.

    Attributes:
        num_cpus: how many threads may call ``score`` at once, so that the images of one batch are scaled while the
            model runs on another. 1 for a reward that is not safe to call so. On cpu there are as many as cores, each
            computing on one: threads of one actor where this is more than 1, or actors.
        num_gpus: the least share of a GPU that holds the weights and these batches. On cuda only; what the rewards of
            a job leave over is shared out between them.
        batch_size: images a model call, where ``--batch-size`` says nothing.
    """

    num_cpus: int = 1
    num_gpus: float = 0.25
    batch_size: int = 32


class Reward(ABC):
    """A function of an image and its prompt; the larger, the better.

    A subclass in a file of this folder is found by the file's name, which is its ``name`` with underscores for dashes.
    Its constructor loads the weights and checks them.

    Attributes:
        name: what ``--reward`` calls it, and the scores table its columns.
        unit: what one unit of the raw score is.
        default_model: hub id used where ``--reward NAME`` names no model; None where it needs none.
        needs: what one actor of it takes of a machine.
        model: the hub id or folder that was loaded.
        fingerprint: hash of the weights, and of everything else in the files that the score depends on.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    default_model: ClassVar[str | None]
    needs: ClassVar[Needs] = Needs()
    model: str
    fingerprint: str

    @abstractmethod
    def __init__(self, model: str | None, device: str) -> None:
        """Load ``model`` (hub id or folder; None: the default) onto ``device``.

        Raises:
            UserError: the weights are missing, incomplete, or of another architecture.
        """

    @abstractmethod
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Raw scores of N RGB images under N prompts: float64 [N], independent of what else is in the batch."""


def checked_scores(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """What ``reward`` says of a batch: float64 [N], NaN where it has no score.

    Raises:
        UserError: it gave something else than one number an image; the reward may be anybody's code. Where it raises
            for one image of several, the line is about that one.
    """
    try:
        scores_N = np.asarray(reward.score(images, prompts), dtype=np.float64)
    except (TypeError, ValueError) as error:
        if len(images) > 1:
            for image, prompt in zip(images, prompts, strict=True):
                checked_scores(reward, [image], [prompt])
            where = f"{len(images)} images together, but of none alone"
        else:
            where = f"an image of {images[0].width} x {images[0].height} pixels, prompt {prompts[0][:_SHOWN]!r}"
        raise UserError(f"--reward {reward.name}: score failed: {error}; of {where}") from error
    if scores_N.shape != (len(images),):
        raise UserError(
            f"--reward {reward.name}: score gave an array of shape {scores_N.shape} for {len(images)} images; "
            f"expected ({len(images)},)"
        )
    return scores_N
