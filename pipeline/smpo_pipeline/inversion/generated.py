"""What ``generate --keep`` stored of a pair's images, in place of their pixels (``--source tracked`` and ``sampled``).

Shape suffixes: K latents of an image, the last and earlier ones; 2 images, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from smpo_models.draws import image_noise
from smpo_models.weights import DTYPES
from smpo_schemas.choices import Dtype
from smpo_schemas.generation.kept_latents import CandidateFolder, KeptImage, KeptLatents
from smpo_schemas.pairs import Pair, PairRejectedError, image_id
from smpo_schemas.reject_kinds import RejectKind

COLUMNS = ("noise_0", "noise_1", "latents_0", "latents_1")
"""Columns of the pairs that say what an image was made from, and where its latents are."""


@dataclass(frozen=True)
class KeptSource:
    """Where the latents of all pairs are.

    Attributes:
        folders: outputs of ``generate --keep``, of one model and resolution.
        side: of their images in pixels.
        states: whether the sampler's states are wanted, too.
    """

    folders: tuple[CandidateFolder, ...]
    side: int
    states: bool


@dataclass(frozen=True)
class GeneratedPair:
    """Latents of a pair's images, as the sampler left them.

    Attributes:
        latents_K2Chw: float32, first what the VAE decoded, then the states of the sampler at ``timesteps``.
        noise: of each image, what its initial noise is drawn from: seed, number of the image, dtype of the sampler.
        timesteps: of the states, increasing; none for ``--source tracked``.
    """

    latents_K2Chw: np.ndarray
    noise: Sequence[tuple[int, int, Dtype]]
    timesteps: tuple[float, ...]

    @classmethod
    def find(cls, pair: Pair, kept: KeptLatents, *, states: bool) -> Self:
        """Find the latents of a pair that was read with the columns :data:`COLUMNS`.

        Args:
            pair: its image files need not be decodable.
            kept: latents of the candidates.
            states: whether the sampler's states are wanted.

        Raises:
            PairRejectedError: an image has no noise or no latents, or the images have no states in common.
            UserError: a file of latents is damaged.
        """
        images = [_kept_image(pair, side, kept) for side in range(2)]
        noise = [_noise(pair, side, image) for side, image in enumerate(images)]
        times = sorted({*images[0].timesteps} & {*images[1].timesteps}) if states else []
        if states and not times:
            raise PairRejectedError(f"{RejectKind.NO_STATES}: none at a timestep that is kept of both images")
        latents = [
            [image.latents_Chw, *(image.states_MChw[image.timesteps.index(time)] for time in times)] for image in images
        ]
        return cls(np.array(latents).swapaxes(0, 1), noise, tuple(times))

    def initial_noise(self, prompt: str) -> torch.Tensor:
        """Draw the noise that the sampler began from: float32 [2, C, h, w], rounded to the sampler's dtype."""
        shape = self.latents_K2Chw.shape[2:]
        drawn = [image_noise(seed, prompt, index, shape).to(DTYPES[dtype]) for seed, index, dtype in self.noise]
        return torch.stack([each.float() for each in drawn])


def blank_pixels(side: int) -> np.ndarray:
    """Return what stands for the pixels of a pair whose latents are kept: uint8 [2, side, side, 0]."""
    return np.empty((2, side, side, 0), np.uint8)


def _kept_image(pair: Pair, side: int, kept: KeptLatents) -> KeptImage:
    name = pair.further[f"latents_{side}"]
    found = kept.find(name, image_id((pair.image_0, pair.image_1)[side]))
    if found is None:
        where = f"no folder of --candidates has them in {name}" if name else f"latents_{side} is empty"
        raise PairRejectedError(f"{RejectKind.NO_LATENTS}: of image_{side}; {where}")
    return found


def _noise(pair: Pair, side: int, image: KeptImage) -> tuple[int, int, Dtype]:
    """Check that the noise is that of the run that made the image.

    Raises:
        PairRejectedError: the noise is missing, or is that of another run.
    """
    value: Any = pair.further[f"noise_{side}"]
    if not isinstance(value, Mapping):
        raise PairRejectedError(f"{RejectKind.NO_NOISE}: noise_{side} is empty")
    folder: CandidateFolder = image.folder
    index = value.get("index", -1)
    known = value.get("seed") == folder.seed and value.get("shape") == list(image.latents_Chw.shape)
    if not known or index not in range(folder.images_per_prompt):
        raise PairRejectedError(f"{RejectKind.NO_NOISE}: noise_{side} {dict(value)} is not of {folder.path}")
    return folder.seed, int(index), folder.dtype
