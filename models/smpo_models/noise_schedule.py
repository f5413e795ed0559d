"""The diffusion process: noise levels, and the way from a model's output to x0 and noise.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler

from smpo_common.errors import UserError
from smpo_common.files import sha256_json

START = -1
"""In place of a timestep: the scheduler's own first level, where its DDIM sampler ends and a trajectory begins."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Process(Protocol):
    """x_t = a_t x0 + s_t noise, and what a model predicts of it.

    All ``t`` are int64 [B], entries below num_train_timesteps, negative ones as :data:`START`; all latents are
    [B, C, h, w].
    """

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are integers in [0, T)."""
        ...

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts: one of :data:`PREDICTION_TYPES`."""
        ...

    def levels(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a_t, s_t), each [B, 1, 1, 1], in the dtype and on the device of ``like``."""
        ...

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """x_t = a_t x0 + s_t noise."""
        ...

    def noise_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """The noise that the model's output at (x_t, t) says is in x_t."""
        ...

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """What the model should have put out at x_t = a_t x0 + s_t noise."""
        ...

    def grid(self, steps: int) -> list[int]:
        """The scheduler's own inference timesteps, increasing."""
        ...

    def fingerprint(self) -> str:
        """Hash of everything that the above depends on."""
        ...


class VariancePreserving:
    """The discrete variance-preserving process of Stable Diffusion: a_t^2 + s_t^2 = 1."""

    def __init__(self, scheduler: DDIMScheduler) -> None:
        """Take the levels of a DDIM scheduler made from the model's own scheduler config.

        Raises:
            UserError: the prediction type is none of :data:`PREDICTION_TYPES`.
        """
        self.scheduler = scheduler
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"the scheduler's prediction type {self.prediction_type!r} is not known; "
                f"known: {', '.join(PREDICTION_TYPES)}"
            )
        first = torch.as_tensor(scheduler.final_alpha_cumprod).double().reshape(1)
        # The first level is kept behind the last timestep, so that START = -1 indexes it.
        products = torch.cat([scheduler.alphas_cumprod.double(), first])
        self._a, self._s = products.sqrt(), (1 - products).sqrt()

    @property
    def num_train_timesteps(self) -> int:
        """T: timesteps are integers in [0, T)."""
        return int(self.scheduler.config["num_train_timesteps"])

    @property
    def prediction_type(self) -> str:
        """``epsilon``, ``v_prediction`` or ``sample``."""
        return str(self.scheduler.config["prediction_type"])

    def levels(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See :class:`Process`; rounded once, from float64."""
        index = t_B.to("cpu").clamp_min(START)
        a, s = (table[index].to(like.device, like.dtype).reshape(-1, 1, 1, 1) for table in (self._a, self._s))
        return a, s

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See :class:`Process`."""
        a, s = self.levels(t_B, x0)
        return a * x0 + s * noise

    def noise_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See :class:`Process`; v = a noise - s x0 (arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return output
        a, s = self.levels(t_B, x_t)
        if self.prediction_type == "v_prediction":
            return a * output + s * x_t
        return (x_t - a * output) / s

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See :class:`Process`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            a, s = self.levels(t_B, x0)
            return a * noise - s * x0
        return x0

    def grid(self, steps: int) -> list[int]:
        """See :class:`Process`."""
        if steps > self.num_train_timesteps:
            raise UserError(f"--steps {steps}: the model has only {self.num_train_timesteps} timesteps")
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        # With trailing spacing, rounding may make one too many, which is -1.
        return sorted(int(t) for t in scheduler.timesteps)[-steps:]

    def fingerprint(self) -> str:
        """See :class:`Process`."""
        config = self.scheduler.config
        spacing = {name: config[name] for name in ("timestep_spacing", "steps_offset", "prediction_type")}
        return sha256_json({"a": self._a.tolist(), **spacing})


def check_scheduler(config: dict[str, Any], what: str) -> None:
    """Compare a model's own scheduler config, as it is on disk, to what a DDIM scheduler takes of it.

    Raises:
        UserError: it is one of another process, of which DDIM would keep nothing and fill in its defaults.
    """
    name = str(config.get("_class_name"))
    if name.startswith("EDM") or "Flow" in name or not {"beta_schedule", "trained_betas", "beta_start"} & set(config):
        raise UserError(
            f"{what}: its scheduler, {name}, has no beta schedule; only variance-preserving models, "
            "whose scheduler config has beta_schedule, are known"
        )
