"""Solvers of x_t = F(x_s, d(x_t, t)), one file each."""

from __future__ import annotations

from collections.abc import Callable

from smpo_pipeline.inversion.solvers.adaptive import adaptive
from smpo_pipeline.inversion.solvers.anderson import anderson
from smpo_pipeline.inversion.solvers.ddim import ddim
from smpo_pipeline.inversion.solvers.renoise import renoise
from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings

SOLVERS: dict[str, Callable[[Step, InversionSettings], Solution]] = {
    "ddim": ddim,
    "renoise": renoise,
    "adaptive": adaptive,
    "anderson": anderson,
}
"""By the names that ``--solver`` takes. A row's solution depends on that row alone."""
