"""What the families with a transformer share; they differ in text encoders and in what the transformer is given.

Shape suffixes: N prompts, B batch, L D a text embedding, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from smpo_models.family import Conditioning
from smpo_models.family_bases.diffusers_family import DiffusersFamily
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.rectified_flow import load_rectified_flow
from smpo_schemas.shards.text_rows import TEXT


def even_times(steps: int) -> np.ndarray:
    """Return the times (sigmas before the shift) that FLUX.1's pipeline, and most later ones, pass to the scheduler."""
    return np.linspace(1.0, 1 / steps, steps)


class TransformerFamily(DiffusersFamily):
    """See :class:`smpo_models.family.Family`.

    Attributes:
        sampler_times: the times that the pipeline passes to its scheduler, given the number of steps; None if it passes
            none.
        sampler_mu: the dynamic shift that the pipeline passes, given the numbers of image tokens and steps; None:
            diffusers' ``calculate_shift``.
    """

    denoiser_folder: ClassVar[str] = "transformer"
    sampler_steps: int = 28
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    stores_text: ClassVar[bool] = True
    sampler_times: ClassVar[Callable[[int], np.ndarray] | None] = None
    sampler_mu: ClassVar[Callable[[int, int], float] | None] = None
    _text_width: ClassVar[str] = "joint_attention_dim"
    """Name of the setting in the transformer's config that holds the width of text embeddings."""

    _text_tokens: int
    """Maximum number of tokens of a prompt, as the pipeline's ``max_sequence_length`` counts them."""

    def _load_schedule(self) -> NoiseSchedule:
        kind = type(self)
        return load_rectified_flow(
            self._model, self._what, sampler_steps=self.sampler_steps, sigmas=kind.sampler_times, mu=kind.sampler_mu
        )

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        return super().settings() | {
            "sampler_steps": self.noise_schedule.sampler_steps,
            "embedded_guidance": self.embedded_guidance,
        }

    def sampling_options(self, guidance_scale: float | None, images: int) -> dict[str, Any]:
        """See the base class; these pipelines take the length to which they cut and pad prompts."""
        return super().sampling_options(guidance_scale, images) | {"max_sequence_length": self._text_tokens}

    def longest_text(self, prompts: int) -> dict[str, torch.Tensor]:
        """See the base class; with a pooled embedding where the transformer takes one."""
        text = {TEXT: torch.zeros(prompts, self._text_tokens, int(self._config[self._text_width]))}
        pooled = self._config.get("pooled_projection_dim")
        return text | ({"pooled": torch.zeros(prompts, int(pooled))} if pooled else {})

    def resolution_multiple(self) -> int:
        """See the base class."""
        return self.latent_factor * self.patch

    def resolution_limits(self) -> tuple[int, int | None]:
        """See the base class; such models draw black or broken images below half the side that they were made for."""
        return self.resolution() // 2, None

    def conditioning(
        self,
        text: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],  # noqa: ARG002
        crops: Sequence[tuple[int, int]],  # noqa: ARG002
    ) -> Conditioning:
        """See the base class; these families take no size and no crop."""
        return Conditioning(text[TEXT], {name: value for name, value in text.items() if name != TEXT})
