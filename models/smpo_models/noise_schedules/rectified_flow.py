"""The noise schedule of flow-matching models: rectified flow (arXiv 2209.03003, 2403.03206).

Shape suffixes: B batch, C h w a latent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_models.weights import load_part
from smpo_schemas.manifest import FLOW

_UNKNOWN = (
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)
"""Settings of the scheduler under which its grid is another one, its time runs backwards, or it adds noise."""

_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "prediction_type": "flow_prediction",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_dynamic_shifting": False,
    "thresholding": False,
}
"""Settings of DPM-Solver that its grid, its end and the meaning of the model's output depend on."""

_SHIFT = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
)


class RectifiedFlow(NoiseSchedule):
    """a = 1 - sigma, s = sigma, t = T sigma; the model predicts the velocity noise - x0.

    The sampler's own clock u runs evenly from 1 down to its lowest time. Its scheduler shifts u to sigma: by a constant
    (``shift``), or by an amount mu that grows with the number of image tokens (``use_dynamic_shifting``, exponential or
    linear); with ``shift_terminal`` it stretches the result so that the last of the sampler's steps has that sigma.
    All shifting is done by diffusers' FlowMatchEulerDiscreteScheduler itself.

    Attributes:
        has_stochastic_steps: whether the model's own scheduler is that class, whose ``stochastic_sampling`` adds noise.
    """

    first_order: ClassVar[str] = "Euler"
    timestep_dtype: ClassVar[torch.dtype] = torch.float32
    prediction_type = FLOW
    has_stochastic_steps = True

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        sampler_steps: int,
        sigmas: Callable[[int], np.ndarray] | None = None,
        mu: Callable[[int, int], float] | None = None,
    ) -> None:
        """Take the settings of a scheduler made from the model's own scheduler config.

        Args:
            scheduler: of the model.
            sampler_steps: how many steps the model is usually sampled in. The shift depends on it with ``mu``, and with
                ``shift_terminal`` if the pipeline passes times that depend on it.
            sigmas: the times u that the model's pipeline passes to the scheduler, given the number of steps,
                decreasing; None if it passes none, and the scheduler takes its own.
            mu: the dynamic shift that the model's pipeline passes, given the numbers of image tokens and steps; None:
                diffusers' ``calculate_shift``, by tokens alone. Not used without ``use_dynamic_shifting``.
        """
        self.scheduler, self._sigmas = scheduler, sigmas
        self._own_mu = mu if scheduler.config["use_dynamic_shifting"] else None
        depends = (scheduler.config["shift_terminal"] and sigmas) or self._own_mu
        self.sampler_steps = sampler_steps if depends else None
        self.num_train_timesteps = self.first_pure_noise = int(scheduler.config["num_train_timesteps"])

    def levels(self, t_B: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class; rounded once, from float64. START is sigma = 0, where the sampler ends."""
        sigma = (t_B.double().clamp_min(0) / self.num_train_timesteps).reshape(-1, 1, 1, 1)
        return (1 - sigma).to(like.device, like.dtype), sigma.to(like.device, like.dtype)

    def noise_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; x_t + (1 - sigma) v."""
        a, _ = self.levels(t_B, x_t)
        return x_t + a * output

    def x0_in(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; x_t - sigma v."""
        _, s = self.levels(t_B, x_t)
        return x_t - s * output

    def direction(self, output: torch.Tensor, x_t: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See the base class; the velocity, which is the output."""
        return output

    def carry(self, x_s: torch.Tensor, direction: torch.Tensor, s_B: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """See the base class; Euler's step x_s + (sigma_t - sigma_s) v.

        DDIM's step with the noise x + (1 - sigma) v has the same fixed points, but one iteration of it moves only a_t /
        a_s as far as Euler's: near pure noise it would hardly move, and have a small residual wherever it began.
        """
        _, sigma_s = self.levels(s_B, x_s)
        _, sigma_t = self.levels(t_B, x_s)
        return x_s + (sigma_t - sigma_s) * direction

    def step_std(self, s_B: torch.Tensor, t_B: torch.Tensor, like: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See the base class; s_s: ``stochastic_sampling`` of diffusers' scheduler draws fresh noise."""
        return self.levels(s_B, like)[1]

    def check_eta(self, eta: float, what: str) -> None:
        """See the base class; only eta = 1, and only with the scheduler that has stochastic steps."""
        if not self.has_stochastic_steps:
            raise UserError(f"{what}: its scheduler, DPM-Solver, has no stochastic Euler steps")
        if eta != 1:
            raise UserError(f"--eta {eta:g}: {what} is a flow model, whose stochastic steps have eta 1 alone")

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See the base class; noise - x0, whatever t."""
        return noise - x0

    def grid(self, steps: int, tokens: int) -> Sequence[float]:
        """See the base class; exactly the timesteps that the model's pipeline samples at, without the final 0.

        The last, T, is pure noise.
        """
        if self.scheduler.config["shift_terminal"] and steps == 1:
            raise UserError(f"--steps {steps}: the model's scheduler stretches its grid, for which it needs two steps")
        scheduler, mu = copy.deepcopy(self.scheduler), self._mu(tokens, steps)
        if self._sigmas is None:
            scheduler.set_timesteps(steps, mu=mu)
        else:
            scheduler.set_timesteps(sigmas=self._sigmas(steps), mu=mu)
        return sorted(scheduler.timesteps.tolist())

    def timesteps_at(self, times: np.ndarray, tokens: int) -> Sequence[float]:
        """See the base class; times are on the sampler's clock before the shift.

        Its lowest time is 1 / T, the lowest that such models are trained at; with ``shift_terminal`` it is the
        sampler's last, below which the stretched sigma would be negative. Each t is below T in float32, too.
        """
        last = self._last_time(self.sampler_steps or 1)
        lowest = last if self.scheduler.config["shift_terminal"] else 1 / self.num_train_timesteps
        scheduler = copy.deepcopy(self.scheduler)
        # The scheduler stretches the grid so that the last time it is given has the sigma of shift_terminal.
        mu = self._mu(tokens, self.sampler_steps or 1)
        scheduler.set_timesteps(sigmas=[*(lowest + times * (1 - lowest)), last], mu=mu)
        below = np.nextafter(np.float32(self.num_train_timesteps), np.float32(0))
        return np.minimum(scheduler.timesteps[:-1].numpy(), below).tolist()

    def _last_time(self, steps: int) -> float:
        """Return the last time, before the shift, at which the sampler evaluates the model."""
        return float(self.scheduler.sigma_min if self._sigmas is None else self._sigmas(steps)[-1])

    def _mu(self, tokens: int, steps: int) -> float | None:
        """Return the dynamic shift; by default linear in the number of tokens, as diffusers' ``calculate_shift``."""
        config = self.scheduler.config
        if self._own_mu:
            return self._own_mu(tokens, steps)
        if not config["use_dynamic_shifting"]:
            return None
        share = (tokens - config["base_image_seq_len"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
        return float(config["base_shift"] + share * (config["max_shift"] - config["base_shift"]))

    def fingerprint(self) -> str:
        """See the base class."""
        config = self.scheduler.config
        settings = {"prediction_type": self.prediction_type} | {name: config[name] for name in _SHIFT}
        return sha256_json(settings | ({"cuts_times": True} if self.cuts_times else {}))


def load_rectified_flow(
    model: str,
    what: str,
    *,
    sampler_steps: int,
    sigmas: Callable[[int], np.ndarray] | None = None,
    mu: Callable[[int, int], float] | None = None,
) -> RectifiedFlow:
    """Load the noise schedule from a model's own scheduler config.

    Args:
        model: hub id or folder.
        what: starts the error.
        sampler_steps: see :class:`RectifiedFlow`.
        sigmas: see :class:`RectifiedFlow`.
        mu: see :class:`RectifiedFlow`.

    Raises:
        UserError: there is no scheduler config, or it is not that of a supported flow model.
    """
    kind, folder = FlowMatchEulerDiscreteScheduler, {"subfolder": "scheduler"}
    config = load_part(kind.load_config, model, what, **folder)
    if is_flow_solver(config):
        return _by_solver_config(config, what, sampler_steps)
    check_flow_scheduler(config, what)
    scheduler = load_part(kind.from_pretrained, model, what, **folder)
    return RectifiedFlow(scheduler, sampler_steps=sampler_steps, sigmas=sigmas, mu=mu)


def is_flow_solver(config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler's config is that of DPM-Solver for flow models; its order 1 is Euler's step."""
    return config.get("_class_name") == "DPMSolverMultistepScheduler" and bool(config.get("use_flow_sigmas"))


def _by_solver_config(config: Mapping[str, Any], what: str, sampler_steps: int) -> RectifiedFlow:
    """Return the noise schedule of a DPM-Solver's config, whose grid differs from that of diffusers' Euler scheduler.

    Raises:
        UserError: the config has settings that change the grid, its end or what the model predicts, or that add noise.
    """
    complete = {**DPMSolverMultistepScheduler().config, **config}
    for setting, value in _SOLVER.items():
        if complete[setting] != value:
            raise UserError(
                f"{what}: its scheduler's config sets {setting} to {complete[setting]}; of DPM-Solver for flow models "
                f"only {value} is known"
            )
    steps = int(complete["num_train_timesteps"])

    def sigmas(number: int) -> np.ndarray:
        return (1 - np.linspace(1, 1 / steps, number + 1))[:0:-1]

    scheduler = FlowMatchEulerDiscreteScheduler(steps, shift=complete["flow_shift"])
    schedule = RectifiedFlow(scheduler, sampler_steps=sampler_steps, sigmas=sigmas)
    schedule.cuts_times, schedule.has_stochastic_steps = True, False
    return schedule


def check_flow_scheduler(config: dict[str, Any], what: str) -> None:
    """Refuse a model's own scheduler config, as it is on disk, that :class:`RectifiedFlow` does not cover.

    Args:
        config: of ``scheduler/scheduler_config.json``.
        what: starts the error.

    Raises:
        UserError: the scheduler is another one, or has settings that change its grid or add noise.
    """
    name = str(config.get("_class_name"))
    if name != "FlowMatchEulerDiscreteScheduler":
        raise UserError(
            f"{what}: its scheduler is {name}; of flow models only FlowMatchEulerDiscreteScheduler is known"
        )
    for setting in _UNKNOWN:
        if config.get(setting):
            raise UserError(
                f"{what}: its scheduler's config sets {setting}; only plain Euler steps on evenly spaced and shifted "
                "times are known"
            )
