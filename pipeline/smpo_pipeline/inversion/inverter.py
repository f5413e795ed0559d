"""Make shard samples from prepared pairs: trajectories, reference errors, residuals, health.

Shape suffixes: S rows (images) that store a state at one visit, K stored states of a trajectory, C h w a latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from smpo_models.draws import gaussian
from smpo_models.family import Family
from smpo_models.noise_schedules.base import NoiseSchedule
from smpo_pipeline.inversion.batch import Batch, PreparedPair, Trajectory, Visit, draw_trajectory
from smpo_pipeline.inversion.denoisers import Denoisers
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.inversion.sources import SOURCES
from smpo_pipeline.inversion.step import distance
from smpo_pipeline.isolation import Failure
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.shards.samples import STORAGE, Sample

_State = tuple[float, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A stored state of one image: timestep, tau [C, h, w] as it is stored, and the scalars ``ref_error``, ``residual`` and
``ref_norm``."""


class Inverter:
    """Makes shard samples, each from its pair, its trajectory's number, the settings and the seed alone."""

    def __init__(
        self, family: Family, inverting_denoiser: nn.Module, settings: InversionSettings, seed: int, device: str = "cpu"
    ) -> None:
        """Take a loaded model, all parts, on the CPU; cast its weights as the settings say, and move it to a device.

        Args:
            family: the model; its denoiser is the reference.
            inverting_denoiser: the denoiser that carries the images along; see :class:`Denoisers`. It is used by
                ``--source renoise`` only; other sources use the reference.
            settings: of the inversion.
            seed: with the pair's id, the source of all randomness.
            device: cpu or cuda.
        """
        self._family, self._settings, self._seed = family, settings, seed
        inverting = inverting_denoiser if settings.source == "renoise" else None
        self._denoisers = Denoisers(family, inverting, settings.dtype, device)

    @property
    def denoisers(self) -> set[nn.Module]:
        """The denoisers that it runs."""
        return {self._denoisers.reference, self._denoisers.inverting}

    @torch.inference_mode()
    def invert(self, requests: Sequence[tuple[PreparedPair, int]]) -> tuple[list[Sample | Failure], HealthSums]:
        """Make the given trajectories (pair, number of the trajectory) in one batch; their images must be of one size.

        Returns:
            For each trajectory its sample, or why there is none; and the health sums of the measured pairs.
        """
        trajectories = [
            draw_trajectory(pair, number, self._family, self._settings, self._seed) for pair, number in requests
        ]
        batch = Batch(trajectories, self._family, self._denoisers.inverting, self._settings)
        health = HealthSums()
        states: list[list[_State]] = [[] for _ in range(2 * len(trajectories))]
        for visit in SOURCES[self._settings.source](batch):
            self._store(batch, visit, states, health)
        samples = [
            _sample(
                trajectory, batch.noise_schedule, batch.x0_RChw[2 * i : 2 * i + 2], states[2 * i], states[2 * i + 1]
            )
            for i, trajectory in enumerate(trajectories)
        ]
        return samples, health

    def _store(self, batch: Batch, visit: Visit, states: list[list[_State]], health: HealthSums) -> None:
        """Keep the states that the trajectories' plans store at this visit, with what is measured at them."""
        positions_S, t_S = batch.stored_at(visit.index, visit.rows_S)
        if len(positions_S) == 0:
            return
        schedule, rows_S = batch.noise_schedule, visit.rows_S[positions_S]
        x0 = batch.x0_RChw[rows_S]
        a, s = schedule.levels(t_S, x0)
        known = visit.noise_SChw
        tau = (visit.x_SChw[positions_S] - a * x0) / s if known is None else known[positions_S]
        tau = tau.to(STORAGE[self._settings.storage])
        # From here on, tau is rounded as it is stored, so that states are exactly those that the trainer rebuilds.
        measured = self._denoisers.measure(x0, tau, t_S, batch.conditioning[rows_S])
        x_t, output = measured.x_SChw, measured.output_SChw
        predicted = schedule.noise_in(output, x_t, t_S)
        residual = self._residual(batch, visit, positions_S, t_S, schedule.direction(output, x_t, t_S))
        self._measure(batch, rows_S, t_S, predicted, tau, residual, health)
        if visit.solved_S is not None:
            last = schedule.num_train_timesteps
            health.count_solved(t_S, last, visit.solved_S[positions_S], self._settings.tolerance)
        columns = (tau, measured.error_S, residual, measured.norm_S)
        for row, t, *state in zip(rows_S.tolist(), t_S.tolist(), *(each.cpu() for each in columns), strict=True):
            states[row].append((t, *state))

    def _residual(
        self,
        batch: Batch,
        visit: Visit,
        positions_S: torch.Tensor,
        used_at_S: torch.Tensor,
        referred: torch.Tensor,
    ) -> torch.Tensor:
        """Return ||x_t - F(x_s, d(x_t, t))|| / ||x_t|| of each state, NaN where no step was taken: float32 [S].

        d is the inverting denoiser's direction, at the timestep at which the step evaluated it: the residual says how
        well that step's equation was solved. No further evaluation is needed if the solver knows the residual, nor if
        the inverting denoiser is the unguided reference and the state is used at that timestep: then d is ``referred``,
        the direction from the forward that measured ``ref_error``, whose input was rounded as it is stored.
        """
        residual = torch.full((len(positions_S),), torch.nan, device=batch.device)
        if visit.origin is None:
            return residual
        if visit.solved_S is not None and not self._settings.eta:
            return visit.solved_S[positions_S]
        x_s, s, asked, stepped = (value[positions_S] for value in visit.origin)
        rows, node, x_t = (value[positions_S] for value in (visit.rows_S, visit.t_S, visit.x_SChw))
        own = self._denoisers.reference_inverts and self._settings.guidance_scale == 1 and torch.equal(asked, used_at_S)
        direction = referred if own else batch.predicted_direction(x_t, asked, rows)
        return torch.where(stepped, distance(x_t, batch.noise_schedule.carry(x_s, direction, s, node)), residual)

    def _measure(
        self,
        batch: Batch,
        rows_S: torch.Tensor,
        t_S: torch.Tensor,
        predicted: torch.Tensor,
        tau: torch.Tensor,
        residual: torch.Tensor,
        health: HealthSums,
    ) -> None:
        """Compare the measured pairs' states with forward-noised states of the same images at the same timesteps."""
        measured = [
            position for position, row in enumerate(rows_S.tolist()) if batch.trajectories[row // 2].pair.measured
        ]
        if not measured:
            return
        rows, t, predicted = rows_S[measured], t_S[measured], predicted[measured]
        if self._settings.source == "forward":
            forward = predicted
        else:
            x0 = batch.x0_RChw[rows]
            noise = torch.stack(
                [_health_noise(batch, row, t) for row, t in zip(rows.tolist(), t.tolist(), strict=True)]
            )
            x_t = batch.noise_schedule.noised(x0, noise.to(batch.device), t)
            output = self._denoisers.refer(x_t, t, batch.conditioning[rows])
            forward = batch.noise_schedule.noise_in(output, x_t, t)
        # A pair whose numbers overflow is rejected in the end; it must not make the sums of the others NaN before.
        finite = [torch.isfinite(each).flatten(1).all(1) for each in (predicted, forward, tau[measured])]
        kept = torch.stack(finite).all(0)
        health.add(
            t[kept],
            batch.noise_schedule.num_train_timesteps,
            predicted_SChw=predicted[kept],
            forward_SChw=forward[kept],
            tau_SChw=tau[measured][kept],
            residual_S=residual[measured][kept],
        )


def _health_noise(batch: Batch, row: int, t: float) -> torch.Tensor:
    """Draw noise [C, h, w] for one image at one timestep, whatever else is in the batch."""
    stream = batch.trajectories[row // 2].stream(f"health/{row % 2}/{t}")
    return gaussian(stream, tuple(batch.x0_RChw.shape[1:]))


def _sample(
    trajectory: Trajectory, schedule: NoiseSchedule, x0_2Chw: torch.Tensor, *images: list[_State]
) -> Sample | Failure:
    """Put both images' states together, or say why they cannot be stored."""
    stored = [torch.stack([torch.stack(each) for each in column]) for column in _columns(images)]
    noise_2KChw, ref_error_2K, residual_2K, ref_norm_2K = stored
    if not all(torch.isfinite(tensor).all() for tensor in (x0_2Chw, noise_2KChw, ref_error_2K)):
        return Failure(f"{RejectKind.NOT_FINITE}: latents, noise or reference error of this pair overflow")
    return Sample(
        meta=trajectory.meta(),
        x0_2Chw=x0_2Chw.to(noise_2KChw.dtype).cpu(),
        noise_K2Chw=noise_2KChw.transpose(0, 1),
        timestep_K=torch.tensor([t for t, *_ in images[0]], dtype=schedule.timestep_dtype),
        ref_error_K2=ref_error_2K.T.float(),
        residual_K2=residual_2K.T.float(),
        ref_norm_K2=ref_norm_2K.T.float(),
    )


def _columns(images: Sequence[list[_State]]) -> list[list[list[torch.Tensor]]]:
    """Return, for each stored tensor and each image, the list over its K states."""
    return [[[state[column] for state in states] for states in images] for column in (1, 2, 3, 4)]
