"""DDIM inversion: the direction at the step's start stands for that at its end; no correction, one evaluation."""

from __future__ import annotations

from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings


def ddim(step: Step, _settings: InversionSettings) -> Solution:
    """x_t = F(x_s, d(x_s, t))."""
    return Solution(step.image(step.x_s_RChw, step.all_rows()), None)
