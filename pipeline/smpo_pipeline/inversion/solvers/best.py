"""The best point that a search with a residual has met so far, row by row, and whether searching on is of use.

Shape suffixes: R rows of the step, N those still searched, C h w a latent.
"""

from __future__ import annotations

import torch

from smpo_pipeline.inversion.step import Solution, Step, distance

GROWTH = 2.0
"""A residual this many times a row's best sends it back there."""

_PATIENCE = 8
_PROGRESS = 0.9
"""A row that has not come below this share of its residual within so many evaluations is given up."""


class Best:
    """x, F(x_s, d(x, t)) and their distance, of the point with the smallest distance, for each row."""

    def __init__(self, step: Step, tolerance: float) -> None:
        self.x_RChw = step.x_s_RChw.clone()
        self.image_RChw = step.x_s_RChw.clone()
        self.residual_R = torch.full_like(step.x_s_RChw[:, 0, 0, 0], torch.inf)
        self._tolerance = tolerance
        self._milestone_R = self.residual_R.clone()
        self._waited_R = torch.zeros_like(self.residual_R)

    def update(self, rows_N: torch.Tensor, x_NChw: torch.Tensor, image_NChw: torch.Tensor) -> torch.Tensor:
        """Take the points that are better than their rows' best; returns the points' residuals [N]."""
        residual = distance(x_NChw, image_NChw)
        better = residual < self.residual_R[rows_N]
        rows = rows_N[better]
        self.x_RChw[rows], self.image_RChw[rows] = x_NChw[better], image_NChw[better]
        self.residual_R[rows] = residual[better]
        nearer = self.residual_R[rows_N] < _PROGRESS * self._milestone_R[rows_N]
        self._milestone_R[rows_N] = torch.where(nearer, self.residual_R[rows_N], self._milestone_R[rows_N])
        self._waited_R[rows_N] = torch.where(nearer, 0.0, self._waited_R[rows_N] + 1)
        return residual

    def searchable(self, rows_N: torch.Tensor) -> torch.Tensor:
        """Which rows are neither there yet nor given up: bool [N]."""
        residual = self.residual_R[rows_N]
        return (residual > self._tolerance) & residual.isfinite() & (self._waited_R[rows_N] < _PATIENCE)

    def solution(self) -> Solution:
        """The best point of each row. Its residual says whether it is a solution.

        A row whose first image was not finite has no such point. It gets NaN, so that its pair is rejected.
        """
        none = ~self.residual_R.isfinite()
        x_RChw = self.x_RChw.masked_fill(none[:, None, None, None], torch.nan)
        return Solution(x_RChw, self.residual_R.masked_fill(none, torch.nan))
