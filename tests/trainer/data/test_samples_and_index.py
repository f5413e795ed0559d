"""Samples that differ from the index, and timesteps outside the noise schedule, end the run and are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smpo_common.files import write_json
from smpo_schemas.manifest import MANIFEST_FILE
from smpo_schemas.shards.index import INDEX_FILE, write_index
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.writer import ShardWriter
from tests.schemas.shards.test_hostile_shards import signed
from tests.trainer.helpers import arguments, run_cli, write_shards

Rows = list[dict[str, Any]]
Change = Callable[[Rows], None]
NAMED = "shard-000000.tar: sample 00000001"


def with_index(shards: Path, folder: Path, change: Change) -> Path:
    """Copy the shards, change rows of the index, and sign the manifest again."""
    shutil.copytree(shards, folder)
    table = pq.read_table(folder / INDEX_FILE)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / INDEX_FILE)
    signed(folder)
    return folder


def one_state_more(rows: Rows) -> None:
    rows[1]["timesteps"].append(999)


def one_state_less(rows: Rows) -> None:
    rows[1]["timesteps"].pop()


def another_timestep(rows: Rows) -> None:
    rows[1]["timesteps"][1] += 1 if rows[1]["timesteps"][1] + 1 < rows[1]["timesteps"][2] else -1


def another_shape(rows: Rows) -> None:
    rows[1]["latent"] = [4, 4, 4]


def another_pair(rows: Rows) -> None:
    rows[1]["meta"] = rows[2]["meta"]


def another_score(rows: Rows) -> None:
    meta = json.loads(rows[1]["meta"])
    rows[1]["meta"] = json.dumps(meta | {"scores": {"taste": meta["scores"]["taste"][::-1]}})


CHANGES = [one_state_more, one_state_less, another_timestep, another_shape, another_pair, another_score]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_sample_that_differs_from_the_index(
    shards: Path, model: Path, tmp_path: Path, change: Change, batch_size: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = with_index(shards, tmp_path / "changed", change)
    args = arguments(folder, model, tmp_path / "run", batch_size=batch_size, max_steps=18 // batch_size)
    assert run_cli(monkeypatch, args) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert NAMED in error
    assert "index" in error
    assert "pair pair-1" in error


def with_timesteps(shards: Path, folder: Path, timesteps: list[int], *, indexed: bool) -> Path:
    """Copy the shards with another trajectory for pair-1, and sign the manifest again."""
    shutil.copytree(shards, folder)
    samples = list(ShardDirectory(shards).samples())[:4]
    samples[1] = replace(samples[1], timestep_K=torch.tensor(timesteps))
    with ShardWriter(folder / "shard-000000.tar") as writer:
        for number, sample in enumerate(samples):
            writer.write(f"{number:08d}", sample)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["index"] = write_index(ShardDirectory(folder)).model_dump() if indexed else None
    write_json(folder / MANIFEST_FILE, manifest)
    signed(folder)
    return folder


@pytest.mark.parametrize(
    ("timesteps", "indexed"),
    [
        ([0, 1, 1000], True),
        ([0, 1, 1000], False),
        ([1, 2, 2**31 - 1], True),
        ([1, 2, 2**40], False),  # an index cannot hold these two
        ([-1, 0, 1], False),
    ],
)
def test_timesteps_outside_the_noise_schedule(
    shards: Path, model: Path, tmp_path: Path, timesteps: list[int], indexed: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = with_timesteps(shards, tmp_path / "changed", timesteps, indexed=indexed)
    assert run_cli(monkeypatch, arguments(folder, model, tmp_path / "run", max_steps=9)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"{NAMED} (pair pair-1): timesteps {timesteps[0]} to {timesteps[-1]} are not within 0 to 999" in error


def test_latents_that_do_not_fit_the_model(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = [
        replace(sample, x0_2Chw=sample.x0_2Chw.repeat(1, 2, 1, 1), noise_K2Chw=sample.noise_K2Chw.repeat(1, 1, 2, 1, 1))
        for sample in ShardDirectory(shards).samples()
    ]
    (tmp_path / "wide").mkdir()
    write_shards(tmp_path / "wide", model, wide, ["taste"])
    assert run_cli(monkeypatch, arguments(tmp_path / "wide", model, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"--shards {tmp_path / 'wide'}" in error
    assert "(8, 8, 8)" in error
