"""The loss of a run: an objective, combined with timestep weights, safeguards and pair weights.

Errors are weighted by timestep, the objective is computed from them, the hinges of budget and norm are added, and the
weight of the pair multiplies the sum.

Shape suffixes: B a batch of states, 2 images.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_trainer.beta_decay import BetaDecay
from smpo_trainer.objectives import Objective
from smpo_trainer.objectives.base import Metrics, PairBatch, implicit_rewards, select_preferred
from smpo_trainer.objectives.timestep_weighting import TimestepWeighting
from smpo_trainer.safeguards.norm_guard import norm_excess, norm_growth
from smpo_trainer.safeguards.winner_preserving import loser_scale, preserve_winner


def budget_excess(reward_B2: torch.Tensor, preferred_B: torch.Tensor, budget: float) -> torch.Tensor:
    """Compute max(0, (beta/2) (e_w - e_w,ref) - budget), [B]; 0 where neither image is preferred.

    Budget-controlled regularization (arXiv 2411.05875): preference losses tend to make even the preferred image less
    likely than under the reference; the budget limits by how much.

    Args:
        reward_B2: implicit rewards, -(beta/2) (e - e_ref).
        preferred_B: positive where image_0 is preferred, negative where image_1 is.
        budget: the allowed excess, in units of the margin.
    """
    return (-select_preferred(reward_B2, preferred_B) - budget).clamp(min=0).where(preferred_B != 0, 0)


@dataclass(frozen=True)
class PairLoss:
    """The loss of a run, see the module's docstring.

    Attributes:
        objective: the loss of a pair.
        noise_schedule: noise levels.
        weighting: weights of the timesteps.
        budget: limit of :func:`budget_excess`; None for no limit.
        budget_weight: factor of the excess.
        beta_decay: schedule of the objective's beta; None to keep it.
        winner_preserving: mu of :mod:`smpo_trainer.safeguards.winner_preserving`; None for full gradients.
        norm_guard: weight of the hinge of :mod:`smpo_trainer.safeguards.norm_guard`, which is multiplied by beta / 2;
            None to leave it out.
    """

    objective: Objective
    noise_schedule: NoiseSchedule
    weighting: TimestepWeighting
    budget: float | None
    budget_weight: float
    beta_decay: BetaDecay | None = None
    winner_preserving: float | None = None
    norm_guard: float | None = None

    def at_step(self, step: int) -> Self:
        """Return the loss of optimizer step ``step``, from 1: the same, but for a beta that has decayed."""
        if self.beta_decay is None:
            return self
        return self.with_beta(self.objective.options.beta * self.beta_decay.factor(step))

    def with_beta(self, beta: float) -> Self:
        """Return the same loss with another beta, which stays."""
        return replace(self, objective=self.objective.with_beta(beta), beta_decay=None)

    def __call__(self, pairs: PairBatch, weight_B: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """Compute the loss of each pair, [B], and metrics; rewards are those of the weighted errors.

        Args:
            pairs: the states, with unweighted errors. A term that needs what is None in them is left out.
            weight_B: weight of each pair.
        """
        pairs, own = self._preserve_winner(pairs)
        timestep_weight_B = self.timestep_weight(pairs.timestep_B, pairs.error_B2[:, 0])
        pairs = replace(
            pairs,
            error_B2=pairs.error_B2 * timestep_weight_B[:, None],
            ref_error_B2=pairs.ref_error_B2 * timestep_weight_B[:, None],
        )
        loss_B, metrics = self.objective(pairs)
        if self.budget is not None:
            reward_B2 = implicit_rewards(pairs.error_B2, pairs.ref_error_B2, self.objective.options.beta)
            excess_B = budget_excess(reward_B2, self.objective.preferred(pairs), self.budget)
            loss_B = loss_B + self.budget_weight * excess_B
            metrics["budget/excess"] = excess_B.detach()
        if pairs.norm_B2 is not None and pairs.ref_norm_B2 is not None:
            own["norm_growth"] = norm_growth(pairs.norm_B2, pairs.ref_norm_B2)
            if self.norm_guard is not None:
                excess_B = norm_excess(pairs.norm_B2, pairs.ref_norm_B2)
                loss_B = loss_B + self.norm_guard * self.objective.options.beta / 2 * excess_B
                own["norm_guard/excess"] = excess_B.detach()
        return loss_B * weight_B, metrics | own

    def _preserve_winner(self, pairs: PairBatch) -> tuple[PairBatch, Metrics]:
        if self.winner_preserving is None or pairs.cross_B is None:
            return pairs, {}
        preferred_B = self.objective.preferred(pairs)
        scale_B = loser_scale(pairs.error_B2, pairs.cross_B, preferred_B, self.winner_preserving)
        error_B2 = preserve_winner(pairs.error_B2, scale_B, preferred_B)
        metrics = {"winner_preserving/scale": scale_B.where(preferred_B != 0, torch.nan)}
        return replace(pairs, error_B2=error_B2), metrics

    def timestep_weight(self, t_B: torch.Tensor, like_B: torch.Tensor) -> torch.Tensor:
        """Return the weights of the timesteps, [B], in the dtype and on the device of ``like_B``."""
        return self.weighting(self.noise_schedule, t_B, like_B.detach())
