"""Compute sizes and costs by formula: forwards of the denoiser, bytes, shards.

Shape suffixes: K states, 2 images, C h w a latent.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from smpo_models.noise_schedules.base import START, NoiseSchedule
from smpo_pipeline.inversion.batch import Trajectory
from smpo_pipeline.inversion.timesteps import TrajectoryPlan, plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.samples import STORAGE, Sample, SampleMeta, encode_sample

_BLOCK = 512
_RECORD = 10240
"""The tar format pads members to blocks, and an archive (with two empty blocks at its end) to records."""

_TEXT = 512
"""About the bytes of a sample's JSON, with a prompt of a few dozen words."""


def forwards(plan: TrajectoryPlan, settings: InversionSettings, *, own_inverting_denoiser: bool) -> int | None:
    """Count the forwards of a denoiser for one image of a trajectory, without those that measure health.

    One per evaluation of a step (two with guidance, except at scale 0), one per stored state for ``ref_error``, and one
    (or two) per stored state for its residual if no other forward gives it: see ``Inverter._residual``.

    Args:
        plan: the trajectory's timesteps.
        settings: of the inversion.
        own_inverting_denoiser: whether the reference is the inverting denoiser.

    Returns:
        The number, or None for solvers that iterate until convergence: it has to be measured.
    """
    stored = len(plan.stored)
    evaluation = 1 if settings.guidance_scale in (0, 1) else 2
    if settings.source == "truncated":
        return len(plan.sampled_at) * evaluation + stored
    if settings.source != "renoise":
        return stored
    if settings.solver not in ("ddim", "renoise"):
        return None
    inverted_from = settings.start if isinstance(settings.start, int) else START
    steps = sum(t > inverted_from for t in plan.nodes)
    evaluations = steps * (1 if settings.solver == "ddim" else settings.renoise_steps + 1)
    if not own_inverting_denoiser or settings.guidance_scale != 1 or settings.timesteps == "published":
        evaluations += stored
    return evaluations * evaluation + stored


def trajectory_bytes(trajectory: Trajectory, latent: tuple[int, int, int], storage: str) -> int:
    """Return the bytes of a trajectory in its tar: both members with headers and padding.

    Args:
        trajectory: as drawn; the scores of its pair matter only by their number of digits.
        latent: C, h, w.
        storage: dtype of x0 and noise, as the manifest names it.
    """
    text = encode_sample(_blank(trajectory.meta(), 1, (1, 1, 1), storage))["json"]
    return _member(len(text)) + _member(_tensor_bytes(len(trajectory.plan.stored), latent, storage))


def pairs_that_fit(
    size: int, latent: tuple[int, int, int], settings: InversionSettings, schedule: NoiseSchedule
) -> int:
    """Return the number of pairs in a tar of about ``size`` bytes, at least one, from the settings alone.

    Args:
        size: bytes.
        latent: C, h, w.
        settings: of the inversion: trajectories per pair, states per trajectory.
        schedule: of the model.
    """
    states = len(plan_trajectory(settings, schedule, 0, "", 0, tokens=1, kept=range(settings.steps)).stored)
    trajectory = _member(_TEXT) + _member(_tensor_bytes(states, latent, settings.storage))
    return max(1, (size - 2 * _BLOCK) // (settings.trajectories * trajectory))


@cache
def _tensor_bytes(states: int, latent: tuple[int, int, int], storage: str) -> int:
    zeros = ((0, 0), (0, 0))
    meta = SampleMeta(
        pair_id="",
        trajectory=0,
        flipped=False,
        prompt="",
        prompt_dropped=False,
        label=None,
        annotator=None,
        scores={},
        size=zeros,
        crop=zeros,
    )
    return len(encode_sample(_blank(meta, states, latent, storage))["safetensors"])


def _blank(meta: SampleMeta, states: int, latent: tuple[int, int, int], storage: str) -> Sample:
    return Sample(
        meta=meta,
        x0_2Chw=torch.zeros(2, *latent, dtype=STORAGE[storage]),
        noise_K2Chw=torch.zeros(states, 2, *latent, dtype=STORAGE[storage]),
        timestep_K=torch.zeros(states, dtype=torch.int64),
        ref_error_K2=torch.zeros(states, 2),
        residual_K2=torch.zeros(states, 2),
        ref_norm_K2=torch.zeros(states, 2),
    )


def _member(content: int) -> int:
    return _BLOCK + math.ceil(content / _BLOCK) * _BLOCK


def num_shards(pairs: int, pairs_per_shard: int) -> int:
    """Return the number of tars for some input pairs."""
    return math.ceil(pairs / pairs_per_shard)


def total_bytes(pairs: int, pairs_per_shard: int, bytes_per_pair: float) -> int:
    """Return the bytes of all tars.

    Args:
        pairs: input pairs.
        pairs_per_shard: input pairs per tar; the last one may have fewer.
        bytes_per_pair: mean over the input of a pair's :func:`trajectory_bytes`, summed over its trajectories.
    """
    full, rest = divmod(pairs, pairs_per_shard)
    return full * _tar(pairs_per_shard * bytes_per_pair) + (_tar(rest * bytes_per_pair) if rest else 0)


def _tar(content: float) -> int:
    return math.ceil((content + 2 * _BLOCK) / _RECORD) * _RECORD
