"""The interface of a reward model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from smpo_common.errors import UserError

if TYPE_CHECKING:
    import torch

_MAX_PROMPT = 200
"""Characters of a prompt in a message."""


@dataclass(frozen=True)
class Needs:
    """Resources of one actor of a reward.

    Attributes:
        threads: threads that may call ``score`` at once, so that one batch is resized while the model runs on another;
            1 if ``score`` is not thread-safe. On a CPU any number above 1 means one thread per core, and 1 means one
            actor per core.
        num_gpus: smallest share of a GPU that holds the weights and a batch; on CUDA only. A job divides unused GPU
            memory among its rewards.
        batch_size: images per model call, unless ``--batch-size`` is given.
        remote: whether a server computes the scores: the job has one actor for it, without a GPU, whatever the device
            and ``--concurrency``, with exactly ``threads`` threads.
    """

    threads: int = 1
    num_gpus: float = 0.25
    batch_size: int = 32
    remote: bool = False


@dataclass(frozen=True)
class Scored:
    """Raw scores of a batch.

    Attributes:
        values: float64 [N]; NaN means that an image has no score.
        reasons: by position, why an image has no score, beginning with a kind of reject and a colon; not needed.
    """

    values: np.ndarray
    reasons: Mapping[int, str] = field(default_factory=dict)


class Reward(ABC):
    """Scores images for prompts; higher is better.

    To add one to this folder, name its file after it, with underscores for dashes. The constructor loads the weights
    and checks them.

    Attributes:
        name: the NAME in ``--reward NAME`` and in the columns of the scores table.
        unit: unit of the raw score.
        default_model: hub id that ``--reward NAME`` loads; None if the reward needs no model.
        needs: resources of one actor.
        model: the hub id or folder that was loaded.
        fingerprint: hash of the weights and of everything else in the files that affects scores.
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
        """Return the raw scores of N RGB images for N prompts, float64 [N], each independent of the rest of the batch.

        NaN means that an image has no score.
        """

    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        """Like :meth:`score`, for rewards that know why an image has no score."""
        return Scored(self.score(images, prompts))

    def score_tensor(self, images_N3HW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the raw scores of N images with values in [0, 1], float [N], with gradient; not every reward can.

        They differ from :meth:`score` by the rounding of images to 8 bits.
        """
        raise NotImplementedError

    @classmethod
    def has_gradient(cls) -> bool:
        """Whether :meth:`score_tensor` is there."""
        return cls.score_tensor is not Reward.score_tensor

    @classmethod
    def named_by(cls, model: str | None) -> type[Reward]:  # noqa: ARG003
        """Return this class under the name that MODEL gives it; most rewards have one name."""
        return cls


def checked_scores(reward: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
    """Score a batch with a reward, which may be a user's own code, and check the result.

    Raises:
        UserError: ``score`` failed, or did not return one number per image. If it fails for one image alone, the
            message describes that image.
    """
    try:
        scored = reward.score_with_reasons(images, prompts)
        scores_N = np.asarray(scored.values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        if len(images) > 1:
            for image, prompt in zip(images, prompts, strict=True):
                checked_scores(reward, [image], [prompt])
            batch = f"{len(images)} images together, though for none of them alone"
        else:
            batch = f"an image of {images[0].width} x {images[0].height} pixels, prompt {prompts[0][:_MAX_PROMPT]!r}"
        raise UserError(f"--reward {reward.name}: score failed: {error}; for {batch}") from error
    if scores_N.shape != (len(images),):
        raise UserError(
            f"--reward {reward.name}: score returned an array of shape {scores_N.shape} for {len(images)} images; "
            f"expected ({len(images)},)"
        )
    return Scored(scores_N, scored.reasons)
