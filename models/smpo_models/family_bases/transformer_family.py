"""What the flow-matching families with a transformer, CLIP and T5 text encoders share.

Shape suffixes: N prompts, B batch, L D a text embedding, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from smpo_models.family import Conditioning
from smpo_models.family_bases.diffusers_family import DiffusersFamily
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.rectified_flow import RectifiedFlow, check_flow_scheduler
from smpo_models.weights import load_part


class TransformerFamily(DiffusersFamily):
    """See :class:`smpo_models.family.Family`.

    The T5 embeddings keep all their padding: these pipelines mask none of it, so that the denoiser attends to it.

    Attributes:
        sampler_times: the times that the pipeline hands to its scheduler, by the number of steps; None: none.
    """

    denoiser_folder: ClassVar[str] = "transformer"
    sampler: ClassVar[str] = "Euler"
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
    _t5_tokens: int
    """Tokens that T5 reads, padding included."""

    def _load_schedule(self) -> NoiseSchedule:
        kind = FlowMatchEulerDiscreteScheduler
        options = {"subfolder": "scheduler"}
        check_flow_scheduler(load_part(kind.load_config, self._model, self._what, **options), self._what)
        scheduler = load_part(kind.from_pretrained, self._model, self._what, **options)
        return RectifiedFlow(scheduler, sampler_steps=self.sampler_steps, sigmas=type(self).sampler_times)

    def settings(self) -> dict[str, Any]:
        """See the base class."""
        return super().settings() | {
            "sampler_steps": self.noise_schedule.sampler_steps,
            "embedded_guidance": self.embedded_guidance,
        }

    def sampling_options(self) -> dict[str, Any]:
        """See the base class; these pipelines cut and pad for T5 as they are told."""
        return {"max_sequence_length": self._t5_tokens}

    def resolution_multiple(self) -> int:
        """See the base class."""
        return self.latent_factor * self.patch

    def resolution_limits(self) -> tuple[int, int | None]:
        """See the base class; below half the side that they were made for such models draw black or broken pictures."""
        return self.resolution() // 2, None

    def conditioning(
        self,
        text: Mapping[str, torch.Tensor],
        sizes: Sequence[tuple[int, int]],  # noqa: ARG002
        crops: Sequence[tuple[int, int]],  # noqa: ARG002
    ) -> Conditioning:
        """See the base class; these families take no size and no crop."""
        return Conditioning(text["text"], {"pooled": text["pooled"]})
