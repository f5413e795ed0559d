"""What trajectories hold and cost, by formula: states, forwards of the denoiser, bytes, shards.

Shape suffixes: K states, 2 images, C h w a latent.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from smpo_models.noise_schedule import START, Process
from smpo_pipeline.inversion.batch import Trajectory
from smpo_pipeline.inversion.timesteps import TrajectoryPlan, plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.samples import STORAGE, Sample, SampleMeta, encode_sample

_BLOCK = 512
_RECORD = 10240
"""Of the tar format: members are padded to blocks, an archive (with two empty blocks at its end) to records."""


_TEXT = 512
"""Of a sample's JSON, about: what a prompt of a few dozen words takes with the rest."""


def forwards(plan: TrajectoryPlan, settings: InversionSettings, *, own_inverting_denoiser: bool) -> int | None:
    """Forwards of a denoiser that one image of a trajectory takes, those that measure health left out.

    One for each step's evaluation (two with guidance), one for each stored state's ``ref_error``, and one (or two) for
    its residual where no other forward gives it: see ``Inverter._residual``.

    Args:
        plan: the trajectory's path.
        settings: of the inversion.
        own_inverting_denoiser: whether the reference is also the inverting denoiser.

    Returns:
        The number, or None for the solvers that iterate until they have converged: it has to be measured.
    """
    stored = len(plan.stored)
    if settings.source == "forward":
        return stored
    if settings.solver not in ("ddim", "renoise"):
        return None
    inverted_from = settings.start if isinstance(settings.start, int) else START
    steps = sum(t > inverted_from for t in plan.nodes)
    evaluations = steps * (1 if settings.solver == "ddim" else settings.renoise_steps + 1)
    if not own_inverting_denoiser or settings.guidance_scale != 1 or settings.timesteps == "published":
        evaluations += stored
    return evaluations * (1 if settings.guidance_scale == 1 else 2) + stored


def trajectory_bytes(trajectory: Trajectory, latent: tuple[int, int, int], storage: str) -> int:
    """Bytes of a trajectory in its tar: both members with their headers and padding.

    Args:
        trajectory: as drawn; of its pair's scores only the number of digits counts.
        latent: C, h, w.
        storage: of x0 and noise, as the manifest names it.
    """
    text = encode_sample(_blank(trajectory.meta(), 1, (1, 1, 1), storage))["json"]
    return _member(len(text)) + _member(_tensor_bytes(len(trajectory.plan.stored), latent, storage))


def pairs_that_fit(size: int, latent: tuple[int, int, int], settings: InversionSettings, process: Process) -> int:
    """Pairs of a tar of about ``size`` bytes, one at least; the same for the same settings, whatever the pairs are.

    Args:
        size: bytes.
        latent: C, h, w.
        settings: of the inversion: trajectories a pair, states a trajectory.
        process: of the model.
    """
    states = len(plan_trajectory(settings, process, 0, "", 0).stored)
    trajectory = _member(_TEXT) + _member(_tensor_bytes(states, latent, settings.storage))
    return max(1, (size - 2 * _BLOCK) // (settings.trajectories * trajectory))


@cache
def _tensor_bytes(states: int, latent: tuple[int, int, int], storage: str) -> int:
    nowhere = ((0, 0), (0, 0))
    meta = SampleMeta(
        pair_id="",
        trajectory=0,
        flipped=False,
        prompt="",
        prompt_dropped=False,
        label=None,
        annotator=None,
        scores={},
        size=nowhere,
        crop=nowhere,
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
    )


def _member(content: int) -> int:
    return _BLOCK + math.ceil(content / _BLOCK) * _BLOCK


def num_shards(pairs: int, pairs_per_shard: int) -> int:
    """A tar for each unit of input pairs."""
    return math.ceil(pairs / pairs_per_shard)


def total_bytes(pairs: int, pairs_per_shard: int, bytes_a_pair: float) -> int:
    """Bytes of all tars.

    Args:
        pairs: input pairs.
        pairs_per_shard: of all shards but the last.
        bytes_a_pair: mean over the input, :func:`trajectory_bytes` of all trajectories of a pair.
    """
    full, rest = divmod(pairs, pairs_per_shard)
    return full * _tar(pairs_per_shard * bytes_a_pair) + (_tar(rest * bytes_a_pair) if rest else 0)


def _tar(content: float) -> int:
    return math.ceil((content + 2 * _BLOCK) / _RECORD) * _RECORD
