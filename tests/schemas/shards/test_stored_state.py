from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smpo_common.errors import UserError
from smpo_schemas.shards import stored_state, tensor_file
from smpo_schemas.shards.reader import SampleLocation, ShardDirectory
from smpo_schemas.shards.samples import Sample
from smpo_schemas.shards.stored_state import read_state
from smpo_schemas.shards.writer import ShardWriter
from tests.schemas.shards.test_hostile_shards import HEADER, MEMBERS, member, signed, tar_of, with_header
from tests.schemas.shards.test_samples import make_sample, write_directory


def written(folder: Path, sample: Sample) -> tuple[ShardDirectory, SampleLocation]:
    """Write a directory with this sample only."""
    write_directory(folder, shards=1, samples=1)
    with ShardWriter(folder / "other.tar") as writer:
        writer.write("000000000", sample)
    content = (folder / "other.tar").read_bytes()
    directory = signed(folder, **{"shard-000000.tar": content})
    return directory, directory.locate(0)[0]


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_a_state_is_that_of_the_whole_sample(tmp_path: Path, storage: torch.dtype) -> None:
    sample = make_sample(3, ref_norm_K2=torch.rand(3, 2)) if storage is torch.float16 else make_sample(3)
    sample = replace(sample, x0_2Chw=sample.x0_2Chw.to(storage), noise_K2Chw=sample.noise_K2Chw.to(storage))
    directory, location = written(tmp_path, sample)
    for k in range(3):
        state = read_state(directory, location, k)
        assert state.trajectory.meta == sample.meta
        assert state.trajectory.timesteps == (100, 200, 300)
        assert state.trajectory.latent == (4, 8, 8)
        assert (state.ref_norm_2 is None) == (sample.ref_norm_K2 is None)
        if sample.ref_norm_K2 is not None:
            assert torch.equal(state.ref_norm_2, sample.ref_norm_K2[k])
            assert torch.equal(directory.read(location).ref_norm_K2, sample.ref_norm_K2)
        for found, wanted in (
            (state.x0_2Chw, sample.x0_2Chw),
            (state.noise_2Chw, sample.noise_K2Chw[k]),
            (state.ref_error_2, sample.ref_error_K2[k]),
        ):
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_other_states_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, location = written(tmp_path, make_sample(0, states=500, timestep_K=torch.arange(500)))
    read = tensor_file.read_at
    lengths = []
    for module in (stored_state, tensor_file):
        monkeypatch.setattr(
            module, "read_at", lambda file, offset, length: lengths.append(length) or read(file, offset, length)
        )
    read_state(directory, location, 77)
    latent = 2 * 4 * 8 * 8 * 2
    assert lengths.count(latent) == 2
    assert sum(lengths) < 2 * latent + 500 * 8 + 2000


def test_a_nan_is_an_error_when_its_state_is_read(tmp_path: Path) -> None:
    sample = make_sample(0)
    sample.noise_K2Chw[1, 0, 3, 7, 7] = math.nan
    sample.ref_error_K2[2, 1] = math.inf
    directory, location = written(tmp_path, sample)
    assert torch.equal(read_state(directory, location, 0).noise_2Chw, sample.noise_K2Chw[0])
    for k, name in ((1, "noise"), (2, "ref_error")):
        with pytest.raises(UserError, match=rf"sample 000000000 \(pair pair 0\): {name} is not finite"):
            read_state(directory, location, k)
    sample.x0_2Chw[1, 0, 0, 0] = math.inf
    directory, location = written(tmp_path, sample)
    with pytest.raises(UserError, match="x0 is not finite"):
        read_state(directory, location, 0)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([0, 999, 1000], "timesteps 0 to 1000 are not within 0 to 999"),
        ([-1, 0, 1], "timesteps -1 to 1 are not within 0 to 999"),
        ([1, 2, 2**40], "are not within 0 to 999"),
        ([5, 5, 7], "do not increase"),
        ([1.0, 2.5, 7.0], "timesteps are not integers, as sd15 needs them"),
    ],
)
def test_timesteps_must_be_within_the_models_range(tmp_path: Path, timesteps: list[float], message: str) -> None:
    directory, location = written(tmp_path, make_sample(0, timestep_K=torch.tensor(timesteps)))
    for read in (lambda: read_state(directory, location, 0), lambda: directory.read(location)):
        with pytest.raises(UserError, match=rf"sample 000000000 .*{message}"):
            read()


@pytest.mark.parametrize("k", [3, -1, 2**40])
def test_a_missing_state_is_named(tmp_path: Path, k: int) -> None:
    directory, location = written(tmp_path, make_sample(0))
    with pytest.raises(UserError, match=f"sample 000000000 .*state {k} .*3"):
        read_state(directory, location, k)


@pytest.mark.parametrize("name", ["x0", "noise", "timestep", "ref_error", "residual"])
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "BF16"},
        {"dtype": "F8_E8M0"},
        {"dtype": ["F16"]},
        {"shape": [2**62, 4]},
        {"shape": [-2, -4, 8, 8]},
        {"shape": [2.0, 4, 8, 8]},
        {"shape": "2488"},
        {"shape": None},
        {"shape": []},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [-1024, 0]},
        {"data_offsets": ["a", None]},
        {"data_offsets": [2**40, 2**40]},
        {"data_offsets": HEADER["timestep"]["data_offsets"], "shape": [0, 2, 4, 8, 8]},
    ],
)
def test_tensors_beyond_the_file_are_refused(tmp_path: Path, name: str, change: dict[str, object]) -> None:
    refused(tmp_path, with_header(**{name: change}))


@pytest.mark.parametrize(
    "tensors",
    [
        b"",
        b"\xff" * 8,
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        MEMBERS["safetensors"][:-1],
    ],
)
def test_malformed_headers_are_refused(tmp_path: Path, tensors: bytes) -> None:
    refused(tmp_path, tensors)


def refused(folder: Path, tensors: bytes) -> None:
    write_directory(folder, shards=1, samples=1)
    tar = tar_of(member("000000000.json"), member("000000000.safetensors"), contents=(MEMBERS["json"], tensors))
    directory = signed(folder, **{"shard-000000.tar": tar})
    with pytest.raises(UserError, match="shard-000000.tar: sample 000000000"):
        read_state(directory, directory.locate(0)[0], 0)


def test_a_wrong_location_is_refused(tmp_path: Path) -> None:
    directory, location = written(tmp_path, make_sample(0))
    for place in (
        replace(location, tensors=(0, 2**62)),
        replace(location, tensors=(-1, 8)),
        replace(location, meta=(10**9, 9)),
    ):
        with pytest.raises(UserError, match="shard-000000.tar: sample 000000000 cannot be read: .*no"):
            read_state(directory, place, 0)
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_state(directory, location, 0)
