from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smpo_common.errors import UserError
from smpo_schemas.manifest import read_manifest, write_manifest
from smpo_schemas.shards.index import INDEX_FILE, indexed_trajectories, write_index, write_index_part
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.stored_state import read_state
from tests.schemas.shards.test_samples import make_sample, write_directory


@pytest.fixture
def indexed(tmp_path: Path) -> ShardDirectory:
    write_directory(tmp_path)
    manifest = read_manifest(tmp_path)
    index = write_index(ShardDirectory(tmp_path, manifest))
    write_manifest(tmp_path, manifest.model_copy(update={"index": index}))
    return ShardDirectory(tmp_path)


def test_index_holds_what_the_tars_hold(indexed: ShardDirectory) -> None:
    trajectories = list(indexed_trajectories(indexed))
    assert len(trajectories) == 6
    for number, trajectory in enumerate(trajectories):
        wanted = make_sample(number)
        assert trajectory.meta == wanted.meta
        assert trajectory.timesteps == tuple(wanted.timestep_K.tolist())
        assert trajectory.latent == tuple(wanted.x0_2Chw.shape[1:])
        read = indexed.read(trajectory.location)
        assert all((read.tensors()[name] == wanted.tensors()[name]).all() for name in ("x0", "noise", "timestep"))


def test_a_directory_without_an_index_reads_the_same(indexed: ShardDirectory) -> None:
    plain = ShardDirectory(indexed.path, indexed.manifest.model_copy(update={"index": None}))
    assert list(indexed_trajectories(plain)) == list(indexed_trajectories(indexed))


def test_equal_tars_give_an_equal_index(indexed: ShardDirectory) -> None:
    first = (indexed.path / INDEX_FILE).read_bytes()
    assert write_index(indexed) == indexed.manifest.index
    assert (indexed.path / INDEX_FILE).read_bytes() == first


def test_timesteps_of_flow_models_are_indexed_and_read_as_they_are(tmp_path: Path) -> None:
    write_directory(tmp_path, flow=True)
    directory = ShardDirectory(tmp_path)
    index = write_index(directory)
    indexed = ShardDirectory(tmp_path, directory.manifest.model_copy(update={"index": index}))
    trajectories = list(indexed_trajectories(indexed))
    assert trajectories == list(indexed_trajectories(directory))
    stored = torch.tensor([0.5, 300.25, 999.9])
    assert {trajectory.timesteps for trajectory in trajectories} == {tuple(stored.tolist())}
    assert read_state(indexed, trajectories[0].location, 2).trajectory.timesteps == tuple(stored.tolist())
    assert torch.equal(indexed.read(trajectories[0].location).timestep_K, stored)


def test_an_index_made_of_parts_keeps_their_timesteps(tmp_path: Path) -> None:
    write_directory(tmp_path, flow=True)
    directory = ShardDirectory(tmp_path)
    whole, part = write_index(directory), tmp_path / "part"
    write_index_part(part, [each for each in indexed_trajectories(directory) if each.location.shard == 0])
    assert write_index(directory, [part, tmp_path / "none"]) == whole


def test_a_damaged_or_missing_index_is_named(indexed: ShardDirectory) -> None:
    path = indexed.path / INDEX_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"index.parquet differs from the SHA-256"):
        list(indexed_trajectories(indexed))
    path.unlink()
    with pytest.raises(UserError, match=r"index.parquet is missing"):
        list(indexed_trajectories(indexed))


@pytest.mark.parametrize("member", ["json", "safetensors"])
def test_a_malformed_member_is_named(tmp_path: Path, member: str) -> None:
    write_directory(tmp_path, shards=1)
    directory = ShardDirectory(tmp_path)
    location = directory.locate(0)[1]
    path = tmp_path / directory.manifest.shards[0].name
    content = bytearray(path.read_bytes())
    offset = (location.meta if member == "json" else location.tensors)[0]
    content[offset : offset + 12] = b"\xff" * 12
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"sample 000000001: malformed {member} member"):
        list(indexed_trajectories(directory))
