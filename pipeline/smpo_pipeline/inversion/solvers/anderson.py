"""Anderson acceleration of the fixed-point iteration (Walker and Ni, SIAM J. Numer. Anal. 49, 2011, algorithm AA).

Shape suffixes: R rows of the step, N those still searched, D differences that are kept, C h w a latent.
"""

from __future__ import annotations

import torch

from smpo_pipeline.inversion.solvers.best import GROWTH, Best
from smpo_pipeline.inversion.step import Solution, Step
from smpo_schemas.inversion_settings import InversionSettings

_RIDGE = 1e-10
"""Ridge of the least-squares problem, relative to its trace: float32 differences are no more precise."""


def anderson(step: Step, settings: InversionSettings) -> Solution:
    """Iterate to the solution that a secant model of the last ``anderson_depth`` differences predicts.

    With g = F(x_s, d(x, t)) and f = g - x: x <- g - dG c, where c minimises ||f - dF c||. The columns of dF and dG
    are the differences between successive f and g of the same row; without any it is the plain iteration. Unlike
    damping it converges for eigenvalues above 1 too. A row whose residual has doubled or is NaN goes back to its best
    point, forgets its differences and takes a plain step from there, each time half as long as the last one. A row that
    comes no nearer is given up and keeps its best point.
    """
    best, rows, x = Best(step, settings.tolerance), step.all_rows(), step.x_s_RChw
    history, weight_R = _History(step.x_s_RChw, settings.anderson_depth), torch.ones_like(best.residual_R)
    for _ in range(settings.max_evaluations):
        before = best.residual_R[rows]
        image = step.image(x, rows)
        lost = ~(best.update(rows, x, image) <= GROWTH * before)
        going = best.searchable(rows)
        rows, x, image, lost = rows[going], x[going], image[going], lost[going]
        if len(rows) == 0:
            break
        x = history.proposal(rows, x, image)
        back = rows[lost]
        history.restart(back, best.x_RChw[back], best.image_RChw[back])
        weight_R[back] /= 2
        x[lost] = torch.lerp(best.x_RChw[back], best.image_RChw[back], weight_R[back][:, None, None, None])
    return best.solution()


class _History:
    """The last differences of f and of g, row by row; missing ones are zeros, which the ridge makes harmless."""

    def __init__(self, like_RChw: torch.Tensor, depth: int) -> None:
        shape = (len(like_RChw), depth, like_RChw[0].numel())
        self._df_RDn, self._dg_RDn = like_RChw.new_zeros(shape), like_RChw.new_zeros(shape)
        self._f_Rn = like_RChw.new_full((shape[0], shape[2]), torch.nan)
        self._g_Rn = self._f_Rn.clone()

    def proposal(self, rows_N: torch.Tensor, x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> torch.Tensor:
        """Add a point and its image to the history; return the next point [N, C, h, w]."""
        g = image_NChw.flatten(1)
        f = g - x_NChw.flatten(1)
        for kept, last, value in ((self._df_RDn, self._f_Rn, f), (self._dg_RDn, self._g_Rn, g)):
            # The first point of a row has none before it: NaN, and no difference.
            difference = (value - last[rows_N]).nan_to_num(0.0)
            kept[rows_N] = torch.cat([difference[:, None], kept[rows_N, :-1]], dim=1)
            last[rows_N] = value
        c = _least_squares(self._df_RDn[rows_N].double(), f.double())
        mixed = g - (self._dg_RDn[rows_N] * c[..., None].to(g.dtype)).sum(1)
        return mixed.reshape_as(x_NChw)

    def restart(self, rows_N: torch.Tensor, x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> None:
        """Forget the differences of these rows, and start again from the given points."""
        self._df_RDn[rows_N], self._dg_RDn[rows_N] = 0.0, 0.0
        self._g_Rn[rows_N] = image_NChw.flatten(1)
        self._f_Rn[rows_N] = (image_NChw - x_NChw).flatten(1)


def _least_squares(df_NDn: torch.Tensor, f_Nn: torch.Tensor) -> torch.Tensor:
    """Return the c that minimises ||f - dF c||, row by row, float64 [N, D], by ridged normal equations."""
    gram = df_NDn @ df_NDn.mT
    scale = gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(gram.dtype).tiny)
    ridge = torch.diag_embed((_RIDGE * scale)[:, None].expand(-1, gram.shape[1]))
    right = (df_NDn @ f_Nn[..., None])[..., 0]
    return torch.linalg.solve_ex(gram + ridge, right)[0].nan_to_num(0.0)
