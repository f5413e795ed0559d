"""DDIM inversion: the noise at the step's start stands for the noise at its end; no correction, one evaluation."""

from __future__ import annotations

from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings


def ddim(step: Step, _settings: InversionSettings) -> Solution:
    """x_t = F(x_s, eps(x_s, t))."""
    return Solution(step.image(step.x_s_RChw, step.all_rows()), None)
