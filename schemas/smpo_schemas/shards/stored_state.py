"""Read one state of a trajectory from a tar, without the trajectory's other states, which are most of a sample.

Shape suffixes: 2 images, C h w a latent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from pydantic import ValidationError

from smpo_common.errors import UserError, describe_problem
from smpo_common.store_path import AnyPath
from smpo_schemas.shards.reader import COPY_AGAIN, IndexedTrajectory, SampleLocation, ShardDirectory
from smpo_schemas.shards.samples import REF_NORM, TIMESTEPS, SampleMeta, layout_problem, timestep_problem
from smpo_schemas.shards.tensor_file import TensorFile, read_at

_NAMES = ("x0", "noise", "timestep", "ref_error", "residual")


@dataclass(frozen=True)
class StoredState:
    """One stored state.

    Attributes:
        trajectory: the state's trajectory.
        x0_2Chw, noise_2Chw, ref_error_2, ref_norm_2: as in :class:`~smpo_schemas.shards.samples.Sample`, of this state.
    """

    trajectory: IndexedTrajectory
    x0_2Chw: torch.Tensor
    noise_2Chw: torch.Tensor
    ref_error_2: torch.Tensor
    ref_norm_2: torch.Tensor | None = None


def read_trajectory(file: BinaryIO, location: SampleLocation, path: AnyPath) -> IndexedTrajectory:
    """Read a sample, without its latents, from ``file``, the opened tar ``path``.

    Raises:
        UserError: it is malformed.
    """
    with _reading(path, location):
        return _read_trajectory(file, location)[0]


def read_state(directory: ShardDirectory, location: SampleLocation, k: int) -> StoredState:
    """Read and check the ``k``-th state of the trajectory at ``location``.

    Raises:
        UserError: it is malformed or missing.
    """
    path = directory.path / directory.manifest.shards[location.shard].name
    with _reading(path, location), path.open("rb") as file:
        trajectory, tensors = _read_trajectory(file, location)
        norms = [REF_NORM] if REF_NORM in tensors else []
        problem = layout_problem({name: (tensors[name].dtype, tensors[name].shape) for name in (*_NAMES, *norms)})
        problem = problem or timestep_problem(trajectory.timesteps, directory.manifest.model)
        if problem is None and not 0 <= k < len(trajectory.timesteps):
            problem = f"there is no state {k} among its {len(trajectory.timesteps)}"
        if problem is None:
            of_state = ("noise", "ref_error", *norms)
            state = {"x0": tensors["x0"].read()} | {name: tensors[name][k].read() for name in of_state}
            bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
            if not bad:
                return StoredState(trajectory, *state.values())
            problem = f"{bad[0]} is not finite"
    raise UserError(f"{path}: sample {location.key} (pair {trajectory.meta.pair_id}): {problem}")


def _read_trajectory(file: BinaryIO, location: SampleLocation) -> tuple[IndexedTrajectory, TensorFile]:
    meta = SampleMeta.model_validate_json(read_at(file, *location.meta))
    tensors = TensorFile(file, *location.tensors)
    timesteps = tensors["timestep"]
    if timesteps.dtype not in TIMESTEPS or len(timesteps.shape) != 1:
        raise ValueError(f"timestep is {timesteps.dtype} {timesteps.shape}")
    latent = tensors["x0"].shape[1:]
    if len(latent) != 3:  # noqa: PLR2004  (C, h, w)
        raise ValueError(f"x0 has the shape {tensors['x0'].shape}, expected [2, C, h, w]")
    return IndexedTrajectory(location, meta, tuple(timesteps.read().tolist()), latent), tensors


@contextmanager
def _reading(path: AnyPath, location: SampleLocation) -> Iterator[None]:
    """Turn what a malformed or hostile sample raises into :class:`UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: sample {location.key} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        problem = describe_problem(error)
        raise UserError(f"{path}: sample {location.key}: malformed json member: {problem}; {COPY_AGAIN}") from error
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: sample {location.key}: malformed safetensors member: {error}; {COPY_AGAIN}"
        ) from error
