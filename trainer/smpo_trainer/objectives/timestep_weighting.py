"""How much a state counts by its timestep: omega(lambda_t) of Diffusion-DPO's margin (arXiv 2311.12908, equation 14).

A weight multiplies the errors themselves, the model's and the reference's, and so stands inside the margin: an
objective regularises with a weighted bound of the likelihood. All weights lie in [0, 1] for epsilon models.

Shape suffixes: B a batch of states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from smpo_models.noise_schedule import Process
from smpo_trainer.settings import TimestepWeightingKind


@dataclass(frozen=True)
class TimestepWeighting:
    """A weight for every timestep.

    Attributes:
        kind: ``uniform``: 1, in the model's own prediction space; ``min-snr``: min(SNR, gamma) on the error of x0
            (arXiv 2303.09556), ``sigmoid``: sigmoid(bias - log SNR) on the error of the noise (arXiv 2303.00848; CaPO,
            arXiv 2502.02588), both brought to the model's prediction space.
        snr_gamma: of ``min-snr``; 5 is the published value.
        bias: of ``sigmoid``; the SNR at which the weight is 1/2 is exp(bias).
    """

    kind: TimestepWeightingKind
    snr_gamma: float
    bias: float

    def __call__(self, process: Process, t_B: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
        """The weights at timesteps ``t_B``: [B], in the dtype and on the device of ``like_B``."""
        if self.kind == "uniform":
            return torch.ones_like(like_B)
        a_B, s_B = (level.reshape(-1) for level in process.levels(t_B, like_B))
        signal_B, noise_B = a_B.square(), s_B.square()  # SNR = signal / noise; written so that SNR = 0 divides nothing
        if self.kind == "min-snr":
            on_noise_B = (self.snr_gamma * noise_B / signal_B).clamp(max=1)
        else:
            on_noise_B = noise_B / (noise_B + signal_B * torch.tensor(-self.bias, dtype=like_B.dtype).exp())
        # At a given x_t: error of the noise = signal * error of v = SNR * error of x0.
        if process.prediction_type == "v_prediction":
            return on_noise_B * signal_B
        return on_noise_B if process.prediction_type == "epsilon" else on_noise_B * signal_B / noise_B

    def identity(self) -> dict[str, str | float]:
        """The settings that matter, by the names of their flags."""
        extra = {"min-snr": {"snr_gamma": self.snr_gamma}, "sigmoid": {"sigmoid_bias": self.bias}, "uniform": {}}
        return {"timestep_weighting": self.kind, **extra[self.kind]}
