"""The explicit midpoint rule, as RF-Solver steps (arXiv 2411.04746): two evaluations, neither at the step's end."""

from __future__ import annotations

from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings


def midpoint(step: Step, _settings: InversionSettings) -> Solution:
    """x_m = x_s + (m - s) v(x_s, s), x_t = x_s + (t - s) v(x_m, m), where m is the middle of s and t.

    It follows the flow itself to second order instead of inverting the sampler's first-order step: few of Euler's steps
    do not keep noise Gaussian, and what leads to the images by them is not, either. Only of flow models, whose
    direction is the velocity.
    """
    rows, schedule = step.all_rows(), step.noise_schedule
    s_R = step.s_R.clamp_min(0)  # the start is sigma = 0
    middle_R = (s_R + step.t_R) / 2
    x_m = schedule.carry(step.x_s_RChw, step.predict(step.x_s_RChw, rows, s_R), s_R, middle_R)
    return Solution(step.carried(step.predict(x_m, rows, middle_R), rows), None)
