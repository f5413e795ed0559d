"""The noise schedule of Stable Diffusion 1.x, 2.x and XL.

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDIMScheduler

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.noise_schedules.base import START, NoiseSchedule
from smpo_models.weights import load_part

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class VariancePreserving(NoiseSchedule):
    """Discrete levels with a_t^2 + s_t^2 = 1, a_t^2 = alphas_cumprod[t]; timesteps are whole numbers in [0, T)."""

    first_order: ClassVar[str] = "DDIM"
    timestep_dtype: ClassVar[torch.dtype] = torch.int64

    def __init__(self, scheduler: DDIMScheduler) -> None:
        """Take the levels of a DDIM scheduler made from the model's own scheduler config.

        Raises:
            UserError: the prediction type is none of :data:`PREDICTION_TYPES`.
        """
        self.scheduler = scheduler
        self.num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        self.prediction_type = str(scheduler.config["prediction_type"])
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(
                f"the scheduler's prediction type {self.prediction_type!r} is not known; "
                f"known: {', '.join(PREDICTION_TYPES)}"
            )
        first = torch.as_tensor(scheduler.final_alpha_cumprod).double().reshape(1)
        # The level of START is stored after that of the last timestep, so that the index START = -1 finds it.
        products = torch.cat([scheduler.alphas_cumprod.double(), first])
        self._a, self._s = products.sqrt(), (1 - products).sqrt()
        self.first_pure_noise = int(self._a[:-1].count_nonzero())

    def levels(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class; rounded once, from float64."""
        index = t_B.to("cpu").clamp_min(START)
        a, s = (table[index].to(like.device, like.dtype).reshape(-1, 1, 1, 1) for table in (self._a, self._s))
        return a, s

    def noise_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; v = a noise - s x0 (arXiv 2202.00512, appendix D)."""
        if self.prediction_type == "epsilon":
            return output
        a, s = self.levels(t_B, x_t)
        if self.prediction_type == "v_prediction":
            return a * output + s * x_t
        return (x_t - a * output) / s

    def x0_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        if self.prediction_type == "sample":
            return output
        a, s = self.levels(t_B, x_t)
        if self.prediction_type == "v_prediction":
            return a * x_t - s * output
        return (x_t - s * output) / a

    def direction(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; the noise."""
        return self.noise_in(output, x_t, t_B)

    def carry(self, x_s: torch.Tensor, direction: torch.Tensor, s_B: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; DDIM's step (arXiv 2010.02502, eq. 12): a_t (x_s - s_s eps) / a_s + s_t eps."""
        a_s, s_s = self.levels(s_B, x_s)
        a_t, s_t = self.levels(t_B, x_s)
        return a_t * (x_s - s_s * direction) / a_s + s_t * direction

    def step_std(self, s_B: torch.Tensor, t_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """See the base class; the posterior's (arXiv 2010.02502, eq. 16): (s_s / s_t) sqrt(1 - a_t^2 / a_s^2)."""
        a_s, s_s = self.levels(s_B, like)
        a_t, s_t = self.levels(t_B, like)
        return (s_s / s_t) * (1 - (a_t / a_s) ** 2).clamp_min(0).sqrt()

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            a, s = self.levels(t_B, x0)
            return a * noise - s * x0
        return x0

    def grid(self, steps: int, tokens: int) -> Sequence[float]:  # noqa: ARG002
        """See the base class; DDIM's timesteps, whatever the image's size."""
        if steps > self.num_train_timesteps:
            raise UserError(f"--steps {steps}: the model has only {self.num_train_timesteps} timesteps")
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        # With trailing spacing, rounding may make one too many, which is -1.
        return sorted(int(t) for t in scheduler.timesteps)[-steps:]

    def timesteps_at(self, times: np.ndarray, tokens: int) -> Sequence[float]:  # noqa: ARG002
        """See the base class; from 1 to the last timestep that is not pure noise, evenly."""
        return [int(t) for t in 1 + np.floor(times * (self.first_pure_noise - 1))]

    def fingerprint(self) -> str:
        """See the base class."""
        config = self.scheduler.config
        spacing = {name: config[name] for name in ("timestep_spacing", "steps_offset", "prediction_type")}
        return sha256_json({"a": self._a.tolist(), **spacing})


def load_variance_preserving(model: str, what: str) -> VariancePreserving:
    """Load the noise schedule from a model's own scheduler config.

    Args:
        model: hub id or folder.
        what: starts the error.

    Raises:
        UserError: there is no scheduler config, or it has no beta schedule.
    """
    kind, folder = DDIMScheduler, {"subfolder": "scheduler"}
    config = load_part(kind.load_config, model, what, **folder)
    check_scheduler(config, what)
    return VariancePreserving(load_part(kind.from_pretrained, model, what, **ddim_options(config), **folder))


def ddim_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which our DDIM scheduler differs from a model's own scheduler config.

    ``clip_sample`` is True by default, also for configs of schedulers that do not have it, but latents must not be
    clipped. With ``linspace`` timesteps, which the multistep solvers use, diffusers' DDIM would step T / n down rather
    than to the next timestep; ``trailing`` timesteps begin at the same one, and DDIM steps from each to the next.
    """
    spacing = {"timestep_spacing": "trailing"} if config.get("timestep_spacing") == "linspace" else {}
    return {"clip_sample": False, **spacing}


def check_scheduler(config: dict[str, Any], what: str) -> None:
    """Refuse a model's own scheduler config, as it is on disk, if it has no beta schedule.

    Raises:
        UserError: it has none: DDIM would ignore its settings and use its own defaults.
    """
    name = str(config.get("_class_name"))
    if name.startswith("EDM") or "Flow" in name or not {"beta_schedule", "trained_betas", "beta_start"} & set(config):
        raise UserError(
            f"{what}: its scheduler, {name}, has no beta schedule; only variance-preserving models, "
            "whose scheduler config has beta_schedule, are known"
        )
