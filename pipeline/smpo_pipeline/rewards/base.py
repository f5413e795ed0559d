"""What a reward model is to this project, and how one is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from PIL import Image


class Reward(ABC):
    """A function of an image and its prompt; the larger, the better.

    A subclass in a file of this folder is found by itself. Its constructor loads the weights and checks them.

    Attributes:
        name: what ``--reward`` calls it, and the scores table its columns.
        unit: what one unit of the raw score is.
        default_model: hub id used where ``--reward NAME`` names no model; None where it needs none.
        model: the hub id or folder that was loaded.
        fingerprint: hash of the weights, and of everything else in the files that the score depends on.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    default_model: ClassVar[str | None]
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
