"""Noise schedules: noise levels, and how a model's output becomes estimates of x0 and noise.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from smpo_common.errors import UserError

START = -1
"""Stands in place of a timestep for the noise level at which the model's own sampler ends and a trajectory begins."""


class NoiseSchedule(ABC):
    """The levels of x_t = a_t x0 + s_t noise, and what a model's output at x_t means.

    All ``t_B`` are [B], of ``timestep_dtype``, below ``num_train_timesteps``; negative ones stand for :data:`START`.
    All latents are [B, C, h, w].

    Attributes:
        first_order: name of the sampler whose step is :meth:`carry`.
        timestep_dtype: int64 where the model knows only whole timesteps, else float32.
        num_train_timesteps: T: timesteps are in [0, T).
        first_pure_noise: the timestep from which on a_t is 0 (zero terminal SNR, arXiv 2305.08891); T where there is
            none below.
        sampler_steps: how many steps the sampler takes, where :meth:`timesteps_at` depends on it; else None. Set it
            after loading.
        cuts_times: whether the sampler rounds t down to a whole number before it gives it to the denoiser.
        prediction_type: what the denoiser predicts: ``epsilon``, ``v_prediction``, ``sample`` or ``flow``.
    """

    first_order: ClassVar[str]
    timestep_dtype: ClassVar[torch.dtype]
    num_train_timesteps: int
    first_pure_noise: int
    sampler_steps: int | None = None
    cuts_times: bool = False
    prediction_type: str

    @abstractmethod
    def levels(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a_t and s_t, each [B, 1, 1, 1], in the dtype and on the device of ``like``."""

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return x_t = a_t x0 + s_t noise."""
        a, s = self.levels(t_B, x0)
        return a * x0 + s * noise

    @abstractmethod
    def noise_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return the model's estimate of the noise in x_t, from its output at (x_t, t)."""

    @abstractmethod
    def x0_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return the model's estimate of x0, from its output at (x_t, t)."""

    @abstractmethod
    def direction(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return what :meth:`carry` needs of the model's output at (x_t, t)."""

    @abstractmethod
    def carry(self, x_s: torch.Tensor, direction: torch.Tensor, s_B: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return F(x_s, direction): one step of the model's first-order sampler, from level s to level t.

        Sampling goes from the noisier level to the other with the direction at its start; inversion goes back, and
        x_t is exact where F(x_s, direction at (x_t, t)) is x_t itself.
        """

    @abstractmethod
    def step_std(self, s_B: torch.Tensor, t_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the standard deviation of the noise in the sampler's stochastic step from level t to level s < t.

        It is for eta = 1: [B, 1, 1, 1], in the dtype and on the device of ``like``.
        """

    def check_eta(self, eta: float, what: str) -> None:
        """Check that the sampler has stochastic steps with this much noise, as ``--eta`` names it.

        Args:
            eta: multiple of :meth:`step_std`.
            what: names the model in errors.

        Raises:
            UserError: the sampler has no such steps.
        """
        if not 0 < eta <= 1:
            raise UserError(f"--eta {eta:g}: the steps of {what} need noise; give a number above 0, at most 1")

    @abstractmethod
    def target(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return what the model is trained to predict at x_t = a_t x0 + s_t noise."""

    @abstractmethod
    def grid(self, steps: int, tokens: int) -> Sequence[float]:
        """Return the timesteps that the model's own sampler visits in ``steps`` steps, increasing.

        Args:
            steps: of the sampler.
            tokens: the image's number of tokens; some flow models sample larger images at higher noise levels.

        Raises:
            UserError: the sampler has no such grid.
        """

    @abstractmethod
    def timesteps_at(self, times: np.ndarray, tokens: int) -> Sequence[float]:
        """Return the timesteps at the given times of the sampler's clock, which is 0 at its lowest noise level.

        Args:
            times: increasing, in [0, 1), float64.
            tokens: as in :meth:`grid`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of everything that the above depends on."""
