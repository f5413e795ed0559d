"""Missing or damaged shards and samples end the run with their name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample
from smpo_trainer.data.order import Order
from smpo_trainer.data.state_table import prompt_draw
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, metrics, run_cli, write_shards

FIRST = "shard-000000.tar"  # pairs 0 to 3 of 6, three states each: states 0 to 11 of 18


def flip_byte(folder: Path) -> str:
    path = folder / FIRST
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    return f"{path} differs from the SHA-256"


def truncate(folder: Path) -> str:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-1024])
    return f"{path} has {path.stat().st_size} bytes, the manifest says"


def remove(folder: Path) -> str:
    (folder / FIRST).unlink()
    return f"{folder / FIRST} is missing"


Damage = Callable[[Path], str]
DAMAGES = [flip_byte, truncate, remove]


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards, for a test to damage."""
    return Path(shutil.copytree(shards, tmp_path / "damaged"))


def samples(shards: Path) -> Iterator[Sample]:
    yield from ShardDirectory(shards).samples()


@pytest.fixture
def with_nan(shards: Path, model: Path, tmp_path: Path) -> Path:
    """The shards with a NaN in a latent of pair-1, as a failed inversion might write it."""
    copies = list(samples(shards))
    x0 = copies[1].x0_2Chw.clone()
    x0[1, 0, 0, 0] = math.nan
    copies[1] = replace(copies[1], x0_2Chw=x0)
    folder = tmp_path / "with-nan"
    folder.mkdir()
    write_shards(folder, model, copies, ["taste"])
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_shard_ends_the_run_with_one_line(
    damaged: Path,
    model: Path,
    tmp_path: Path,
    damage: Damage,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = damage(damaged)
    assert run_cli(monkeypatch, arguments(damaged, model, tmp_path / "run", workers=workers)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert said in error


def test_nan_latents_end_the_run_with_one_line(
    with_nan: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, arguments(with_nan, model, tmp_path / "run", max_steps=9)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"{FIRST}: sample 00000001 (pair pair-1): x0 is not finite" in error


def test_another_schema_version_ends_the_run(
    damaged: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = damaged / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert run_cli(monkeypatch, arguments(damaged, model, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "manifest.json" in error
    assert "99" in error


def test_a_bad_held_out_state_ends_the_run_with_one_line(
    with_nan: Path,
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = next(sample.meta.prompt for sample in samples(shards) if sample.meta.pair_id == "pair-1")
    options = {"val_fraction": prompt_draw(broken) + 1e-9, "max_steps": 1}
    assert run_cli(monkeypatch, arguments(with_nan, model, tmp_path / "run", **options)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "sample 00000001 (pair pair-1): x0 is not finite" in error


@pytest.mark.slow
def test_the_run_resumes_once_the_shard_is_restored(
    train: Train,
    damaged: Path,
    shards: Path,
    other_unet: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One shard per window, and no reference noise to measure: the run starts with one shard only.
    options = {"unet": other_unet, "max_steps": 9, "save_every": 1, "shuffle_window": 1, "beta": 200, "lr": 1e-5}
    order = Order((12, 6), seed=0, window=1)
    last = order.shard_of(order.state_at(17))
    gone = damaged / f"shard-{last:06d}.tar"
    away = gone.rename(tmp_path / gone.name)
    assert run_cli(monkeypatch, arguments(damaged, model, tmp_path / "run", **options)) == 2
    assert metrics(tmp_path / "run")
    away.rename(gone)
    run, whole = train("run", on=damaged, **options), train("whole", on=shards, **options)
    for name in ("loss", "grad_norm", "step"):
        assert column(run, name) == column(whole, name)
