"""A model's two samplers: its pipeline's own scheduler, and the first-order scheduler of the same noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from smpo_models.noise_schedules.rectified_flow import is_flow_solver
from smpo_models.noise_schedules.variance_preserving import ddim_options
from smpo_models.weights import load_part


def own_sampler(model: str, what: str, first_order: str) -> str:
    """Return the class name of a model's own scheduler, or ``first_order`` if it takes first-order steps.

    Args:
        model: hub id or folder.
        what: starts the error.
        first_order: name of the first-order sampler.

    Raises:
        UserError: the configs cannot be read.
    """
    config = load_part(DDIMScheduler.load_config, model, what, subfolder="scheduler")
    index = load_part(DiffusionPipeline.load_config, model, what)
    # The pipeline's index decides which class is loaded.
    _, name = index.get("scheduler", (None, config.get("_class_name")))
    return first_order if _is_first_order(str(name), config) else str(name)


def first_order_scheduler(scheduler: Any) -> Any:  # noqa: ANN401  (diffusers has no types)
    """Return a first-order scheduler with the noise levels and timesteps of a pipeline's own scheduler."""
    name, config = type(scheduler).__name__, scheduler.config
    if _is_first_order(name, config):
        return scheduler
    if is_flow_solver({**config, "_class_name": name}):
        return DPMSolverMultistepScheduler.from_config(config, solver_order=1)  # Euler's steps
    return DDIMScheduler.from_config(config, **ddim_options(config))


def _is_first_order(name: str, config: Mapping[str, Any]) -> bool:
    if is_flow_solver({**config, "_class_name": name}):
        return config.get("solver_order") == 1
    if name != "DDIMScheduler":
        return name == "FlowMatchEulerDiscreteScheduler"
    complete = {**DDIMScheduler().config, **config}
    return all(complete[setting] == value for setting, value in ddim_options(config).items())
