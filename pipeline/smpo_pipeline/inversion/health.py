"""Measures of trajectory health by timestep band: sums over a sample of pairs, and how many of all states converged.

Shape suffixes: S states of one image each, C h w a latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

import numpy as np
import torch

from smpo_schemas.manifest import BandHealth

NUM_BANDS = 5
_FIELDS = (
    "states",
    "predicted_sq",
    "forward_sq",
    "residual",
    "residuals",
    "neighbour_products",
    "neighbours",
    "tau_sq",
    "elements",
    "solved",
    "unconverged",
)


class HealthSums:
    """Sums that add up over batches and workers; kept as plain numbers so that a unit's record can hold them."""

    def __init__(self, bands: Iterable[Iterable[float]] | None = None) -> None:
        values = [list(band) for band in bands] if bands else [[0.0] * len(_FIELDS) for _ in range(NUM_BANDS)]
        self._sums_BF = np.array(values, dtype=np.float64)

    def __iadd__(self, other: HealthSums) -> Self:
        self._sums_BF += other._sums_BF
        return self

    def to_lists(self) -> list[list[float]]:
        """Return the sums as plain numbers, [bands][fields]."""
        return self._sums_BF.tolist()

    def add(
        self,
        t_S: torch.Tensor,
        num_train_timesteps: int,
        *,
        predicted_SChw: torch.Tensor,
        forward_SChw: torch.Tensor,
        tau_SChw: torch.Tensor,
        residual_S: torch.Tensor,
    ) -> None:
        """Add S states.

        Args:
            t_S: their timesteps.
            num_train_timesteps: T.
            predicted_SChw: noise that the reference predicts at the stored states.
            forward_SChw: noise that it predicts at forward-noised states of the same images at the same t.
            tau_SChw: the stored noise.
            residual_S: distance from the fixed point, NaN where no step was taken.
        """
        tau = tau_SChw.double().cpu()
        products = (tau[..., 1:, :] * tau[..., :-1, :]).sum((1, 2, 3)) + (tau[..., 1:] * tau[..., :-1]).sum((1, 2, 3))
        _, channels, height, width = tau.shape
        residual = residual_S.double().cpu()
        rows_SF = torch.stack(
            [
                torch.ones_like(residual),
                predicted_SChw.double().cpu().square().sum((1, 2, 3)),
                forward_SChw.double().cpu().square().sum((1, 2, 3)),
                residual.nan_to_num(0.0),
                (~residual.isnan()).double(),
                products,
                torch.full_like(residual, channels * ((height - 1) * width + height * (width - 1))),
                tau.square().sum((1, 2, 3)),
                torch.full_like(residual, channels * height * width),
                *[torch.zeros_like(residual)] * 2,
            ],
            dim=1,
        )
        self._add(t_S, num_train_timesteps, rows_SF)

    def count_solved(
        self, t_S: torch.Tensor, num_train_timesteps: int, solved_S: torch.Tensor, tolerance: float
    ) -> None:
        """Count S states whose solver had a tolerance to reach, and those that did not reach it.

        Args:
            t_S: their timesteps.
            num_train_timesteps: T.
            solved_S: the residuals at which the solver stopped, NaN where no step was taken.
            tolerance: the settings'.
        """
        solved = solved_S.cpu()[~solved_S.cpu().isnan()]
        rows_SF = torch.zeros(len(solved), len(_FIELDS), dtype=torch.float64)
        rows_SF[:, _FIELDS.index("solved")] = 1
        rows_SF[:, _FIELDS.index("unconverged")] = (solved > tolerance).double()
        self._add(t_S.cpu()[~solved_S.cpu().isnan()], num_train_timesteps, rows_SF)

    def _add(self, t_S: torch.Tensor, num_train_timesteps: int, rows_SF: torch.Tensor) -> None:
        np.add.at(self._sums_BF, (t_S.cpu() * NUM_BANDS // num_train_timesteps).long().numpy(), rows_SF.numpy())

    def bands(self, num_train_timesteps: int) -> list[BandHealth]:
        """Return the measures of each band; they are None where a band holds no state."""
        edges = [math.ceil(band * num_train_timesteps / NUM_BANDS) for band in range(NUM_BANDS + 1)]
        health = []
        for start, stop, values in zip(edges[:-1], edges[1:], self._sums_BF.tolist(), strict=True):
            band = dict(zip(_FIELDS, values, strict=True))
            correlation = None
            if band["tau_sq"] > 0:
                correlation = (band["neighbour_products"] / band["neighbours"]) / (band["tau_sq"] / band["elements"])
            health.append(
                BandHealth(
                    start=start,
                    stop=stop,
                    states=int(band["states"]),
                    noise_ratio=math.sqrt(band["predicted_sq"] / band["forward_sq"]) if band["forward_sq"] else None,
                    residual=band["residual"] / band["residuals"] if band["residuals"] else None,
                    neighbour_correlation=correlation,
                    solved=int(band["solved"]),
                    unconverged=int(band["unconverged"]),
                )
            )
        return health
