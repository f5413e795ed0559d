"""Errors and norms of a denoiser's outputs at stored states.

Shape suffixes: B batch, R = 2B rows (image_0 of every state, then image_1), C h w a latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class PairOutputs:
    """What is measured of a denoiser's outputs, in its own prediction space; means are over C, h, w.

    Attributes:
        error_B2: mean squared difference r of output and target, float32.
        cross_B: mean product of both images' r, float32, without gradient.
        norm_B2: root mean square of the output, float32.
    """

    error_B2: torch.Tensor
    cross_B: torch.Tensor
    norm_B2: torch.Tensor


def pair_outputs(family: Family, denoiser: nn.Module, batch: StateBatch, conditioning: Conditioning) -> PairOutputs:
    """Measure a denoiser's outputs; both images of all pairs go through one forward."""
    # Rebuild x_t in float32 from the stored x0 and noise: exactly the state at which ref_error was measured.
    x0_RChw = _rows(batch.x0_B2Chw)
    noise_RChw = _rows(batch.noise_B2Chw)
    t_R = batch.timestep_B.repeat(2)
    x_RChw = family.noise_schedule.noised(x0_RChw, noise_RChw, t_R)
    output_RChw = family.denoise(denoiser, x_RChw, t_R, conditioning)
    target_RChw = family.noise_schedule.target(x0_RChw, noise_RChw, t_R)
    residual_RChw = output_RChw - target_RChw
    first_BChw, second_BChw = residual_RChw.detach().chunk(2)
    norm_R = torch.linalg.vector_norm(output_RChw, dim=(1, 2, 3)) / math.sqrt(output_RChw[0].numel())
    return PairOutputs(
        error_B2=residual_RChw.square().mean(dim=(1, 2, 3)).reshape(2, -1).T,
        cross_B=(first_BChw * second_BChw).mean(dim=(1, 2, 3)),
        norm_B2=norm_R.reshape(2, -1).T,
    )


def pair_errors(family: Family, denoiser: nn.Module, batch: StateBatch, conditioning: Conditioning) -> torch.Tensor:
    """Compute the errors alone: float32 [B, 2]."""
    return pair_outputs(family, denoiser, batch, conditioning).error_B2


@torch.no_grad()
def reference_errors(policy: Policy, batch: StateBatch, accelerator: Accelerator) -> torch.Tensor:
    """Compute the errors of the reference, or of a policy that is still untrained: float32 [B, 2]."""
    # Outside autocast, as in training: the text encoders keep their own dtype.
    conditioning = condition(policy, batch)
    with accelerator.autocast():
        return pair_errors(policy.family, policy.reference or policy.denoiser, batch, conditioning)


def _rows(latents_B2Chw: torch.Tensor) -> torch.Tensor:
    return torch.cat(latents_B2Chw.float().unbind(1))
