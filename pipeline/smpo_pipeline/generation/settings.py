"""Everything that decides what ``generate`` stores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from smpo_schemas.candidates import ImageFormat
from smpo_schemas.dtypes import Dtype
from smpo_schemas.frozen import FrozenModel

LATENTS = "latents"


class GenerationSettings(FrozenModel):
    """The settings of a generation.

    Attributes:
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, 1 is none; or what the model is told; None for models without.
        seed: of all noise.
        dtype: of the model.
        resolution: side of the images in pixels.
        images_per_prompt: K.
        image_format: of the images' files.
        keep: ``latents``, ``states:M``, or None.
    """

    steps: int
    guidance_scale: float | None
    seed: int
    dtype: Dtype
    resolution: int
    images_per_prompt: int
    image_format: ImageFormat
    keep: str | None

    @property
    def num_states(self) -> int:
        """Number of the sampler's states to keep of each image."""
        return num_states(self.keep)

    def nodes(self, prompt: str) -> list[int]:
        """Draw which of the sampler's steps to keep the input of, increasing; by seed and prompt alone.

        The images of a prompt share them: both images of a pair need states at the same timesteps.
        """
        from smpo_models.draws import named_stream  # noqa: PLC0415  (torch: not in workers that encode images)

        stream = named_stream(f"{self.seed}/states/{prompt}")
        return sorted(stream.choice(self.steps, self.num_states, replace=False).tolist())

    def image_bytes(self, latent_shape: Sequence[int]) -> int:
        """Bytes of an image's pixels and what is kept of it, in memory."""
        kept = (1 + self.num_states) if self.keep else 0
        return 3 * self.resolution**2 + 4 * kept * math.prod(latent_shape)


def num_states(keep: str | None) -> int:
    """Number of states of ``states:M``; 0 for anything else."""
    return int(keep.partition(":")[2] or 0) if keep else 0
