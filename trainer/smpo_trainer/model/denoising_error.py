"""Errors of a denoiser at stored states.

Shape suffixes: B batch, R = 2B rows (image_0 of every state, then image_1), C h w a latent.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from smpo_models.family import Conditioning, Family
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.model.policy import Policy


def condition(policy: Policy, batch: StateBatch) -> Conditioning:
    """Compute text and size conditioning of the 2B rows."""
    sizes = [size[image] for image in (0, 1) for size in batch.sizes]
    crops = [crop[image] for image in (0, 1) for crop in batch.crops]
    return policy.family.condition(batch.prompts * 2, sizes, crops)


def pair_errors(family: Family, denoiser: nn.Module, batch: StateBatch, conditioning: Conditioning) -> torch.Tensor:
    """Compute the mean squared error over C, h, w in the model's own prediction space: float32 [B, 2].

    Both images of all pairs go through one forward.
    """
    # Rebuild x_t in float32 from the stored x0 and noise: exactly the state at which ref_error was measured.
    x0_RChw = _rows(batch.x0_B2Chw)
    noise_RChw = _rows(batch.noise_B2Chw)
    t_R = batch.timestep_B.repeat(2)
    x_RChw = family.noise_schedule.noised(x0_RChw, noise_RChw, t_R)
    output_RChw = family.denoise(denoiser, x_RChw, t_R, conditioning)
    target_RChw = family.noise_schedule.target(x0_RChw, noise_RChw, t_R)
    error_R = (output_RChw - target_RChw).square().mean(dim=(1, 2, 3))
    return error_R.reshape(2, -1).T


@torch.no_grad()
def reference_errors(policy: Policy, batch: StateBatch, accelerator: Accelerator) -> torch.Tensor:
    """Compute the errors of the reference, or of a policy that is still untrained: float32 [B, 2]."""
    # Outside autocast, as in training: the text encoders keep their own dtype.
    conditioning = condition(policy, batch)
    with accelerator.autocast():
        return pair_errors(policy.family, policy.reference or policy.denoiser, batch, conditioning)


def _rows(latents_B2Chw: torch.Tensor) -> torch.Tensor:
    return torch.cat(latents_B2Chw.float().unbind(1))
