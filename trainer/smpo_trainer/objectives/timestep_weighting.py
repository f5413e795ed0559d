"""Weights of timesteps: omega(lambda_t) in the margin of Diffusion-DPO (arXiv 2311.12908, equation 14).

A weight multiplies the errors of policy and reference, so it acts inside the margin: the objective regularises with a
weighted bound of the likelihood. For epsilon models all weights but those of ``x0`` and ``transition`` lie in [0, 1].

Shape suffixes: B a batch of states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.noise_schedules.transition import StochasticSteps
from smpo_schemas.manifest import FLOW
from smpo_trainer.loss_settings import TimestepWeightingKind


@dataclass(frozen=True)
class TimestepWeighting:
    """A weight for every timestep.

    Attributes:
        kind: ``uniform`` is 1 in the model's own prediction space; ``min-snr`` is min(SNR, gamma) on the error of x0
            (arXiv 2303.09556); ``sigmoid`` is sigmoid(bias - log SNR) on the error of the noise (arXiv 2303.00848;
            CaPO, arXiv 2502.02588); ``x0`` is 1 on the error of x0 (Self-NPO, arXiv 2505.11777), that is 1 / SNR on
            that of the noise; ``transition`` is c^2 / sigma^2 on that of the noise, with which an image's implicit
            reward is beta times the mean over C, h, w of log p(x_s | x_t) - log p_ref(x_s | x_t) of the sampler's step
            (TailorPO, arXiv 2502.01667). All but ``uniform`` are converted to the model's prediction space.
        snr_gamma: gamma of ``min-snr``; the published value is 5.
        bias: bias of ``sigmoid``; the weight is 1/2 at SNR = exp(bias).
        x0_cap: largest weight of ``x0`` on the error of the noise; None for no limit.
        steps: the sampler's steps, for ``transition``.
    """

    kind: TimestepWeightingKind
    snr_gamma: float
    bias: float
    x0_cap: float | None = None
    steps: StochasticSteps | None = None

    def __call__(self, schedule: NoiseSchedule, t_B: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
        """Compute the weights at timesteps ``t_B``: [B], in the dtype and on the device of ``like_B``."""
        if self.kind == "uniform":
            return torch.ones_like(like_B)
        a_B, s_B = (level.reshape(-1) for level in schedule.levels(t_B, like_B))
        signal_B, noise_B = a_B.square(), s_B.square()  # SNR = signal / noise; never divide by it, it may be 0
        if self.kind == "x0":
            return _on_x0(schedule, signal_B, noise_B, self.x0_cap)
        if self.steps is not None:
            step = self.steps.transition(schedule, t_B, like_B)
            # c^2 / sigma^2 on the error of the noise is (on_x0 / sigma)^2 on that of x0.
            return _on_x0(schedule, signal_B, noise_B, None) * (step.on_x0 / step.std).square().reshape(-1)
        if self.kind == "min-snr":
            on_noise_B = (self.snr_gamma * noise_B / signal_B).clamp(max=1)
        else:
            on_noise_B = noise_B / (noise_B + signal_B * torch.tensor(-self.bias, dtype=like_B.dtype).exp())
        # Convert to the prediction space. At a given x_t: error of noise = signal * error of v (or velocity)
        # = SNR * error of x0.
        if schedule.prediction_type in {"v_prediction", FLOW}:
            return on_noise_B * signal_B
        return on_noise_B if schedule.prediction_type == "epsilon" else on_noise_B * signal_B / noise_B

    def identity(self) -> dict[str, str | float | None]:
        """Return the settings that affect the weights, by the names of their flags."""
        identity: dict[str, str | float | None] = {"timestep_weighting": self.kind}
        if self.kind == "min-snr":
            identity["snr_gamma"] = self.snr_gamma
        elif self.kind == "sigmoid":
            identity["sigmoid_bias"] = self.bias
        elif self.kind == "x0":
            identity["x0_cap"] = self.x0_cap
        return identity


def _on_x0(
    schedule: NoiseSchedule, signal_B: torch.Tensor, noise_B: torch.Tensor, x0_cap: float | None
) -> torch.Tensor:
    """Convert the weight min(1, cap SNR) on the error of x0 to the prediction space: [B]."""
    cap = torch.inf if x0_cap is None else x0_cap
    if schedule.prediction_type == "epsilon":
        return (noise_B / signal_B).clamp(max=cap)
    on_x0_B = torch.ones_like(signal_B) if x0_cap is None else (cap * signal_B / noise_B).clamp(max=1)
    return on_x0_B if schedule.prediction_type == "sample" else on_x0_B * noise_B
