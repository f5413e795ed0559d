"""Fixed-point iteration with per-row stopping: ReNoise without averaging, until it has converged.

Shape suffixes: R rows of the step, N those still searched, C h w a latent.
"""

from __future__ import annotations

import torch

from smpo_pipeline.inversion.solvers.best import GROWTH, Best
from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings

_SMALLEST_WEIGHT = 0.125
_QUICK = 0.5
"""A row whose residual shrinks to this share of the last one, or below, is not damped."""


def adaptive(step: Step, settings: InversionSettings) -> Solution:
    """Iterate x <- x + w f, with f = F(x_s, d(x, t)) - x, until the residual is within the tolerance.

    x starts at x_s, w at 1. A row that has converged leaves the batch. A row whose f points against the previous one
    without being much smaller oscillates about its solution: the derivative of F has eigenvalues near or below -1. It
    is damped: w is halved, down to 1/8. A row whose residual has doubled or is NaN is damped, too, after going back to
    its best point. No w helps against eigenvalues above 1: a row that comes no nearer is given up, and keeps its best
    point, whose residual is above the tolerance.
    """
    best, rows, x = Best(step, settings.tolerance), step.all_rows(), step.x_s_RChw
    weight_R, last_R = torch.ones_like(best.residual_R), best.residual_R.clone()
    last_f_RChw = torch.zeros_like(x)
    for _ in range(settings.max_evaluations):
        before = best.residual_R[rows]
        f = step.image(x, rows) - x
        residual = best.update(rows, x, x + f)
        lost = ~(residual <= GROWTH * before)
        turned = (f * last_f_RChw[rows]).sum((1, 2, 3)) < 0
        swings = lost | (turned & (residual > _QUICK * last_R[rows]))
        weight_R[rows] = torch.where(swings, (weight_R[rows] / 2).clamp_min(_SMALLEST_WEIGHT), weight_R[rows])
        last_R[rows], last_f_RChw[rows] = residual, f
        going = best.searchable(rows)
        rows, x, f, lost = rows[going], x[going], f[going], lost[going]
        if len(rows) == 0:
            break
        back = rows[lost]
        x[lost], f[lost] = best.x_RChw[back], best.image_RChw[back] - best.x_RChw[back]
        last_R[back], last_f_RChw[back] = best.residual_R[back], f[lost]
        x = x + weight_R[rows][:, None, None, None] * f
    return best.solution()
