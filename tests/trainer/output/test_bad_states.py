"""Shards and samples that are missing or damaged: named at once, or left out and counted (``--skip-bad``)."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smpo_schemas.shards.samples import Sample, ShardDirectory
from smpo_trainer.data.loader import collate, stand_in
from smpo_trainer.data.order import Order
from smpo_trainer.data.state_table import prompt_draw
from smpo_trainer.objectives import objectives
from smpo_trainer.objectives.base import PairBatch
from smpo_trainer.output.checkpoints import Checkpoints
from tests.tiny import LATENT_SHAPE
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, dying_after, metrics, run_cli, write_shards
from tests.trainer.output.test_resume import launch_two

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
    """A copy of the shards, yet whole."""
    return Path(shutil.copytree(shards, tmp_path / "damaged"))


def samples(shards: Path) -> Iterator[Sample]:
    yield from ShardDirectory(shards).samples()


@pytest.fixture
def with_nan(shards: Path, model: Path, tmp_path: Path) -> Path:
    """The shards with a NaN in one latent of pair-1, as an inversion that went wrong would have written it."""
    found = list(samples(shards))
    x0 = found[1].x0_2Chw.clone()
    x0[1, 0, 0, 0] = math.nan
    found[1] = replace(found[1], x0_2Chw=x0)
    folder = tmp_path / "with-nan"
    folder.mkdir()
    write_shards(folder, model, found, ["taste"])
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
    assert "--skip-bad" in error


def test_nan_latents_end_the_run_with_one_line(
    with_nan: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, arguments(with_nan, model, tmp_path / "run", max_steps=9)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert f"{FIRST}: sample 00000001 (pair pair-1): x0 is not finite" in error


@pytest.mark.parametrize("flags", [{}, {"skip_bad": True}])
def test_another_schema_version_always_ends_the_run(
    damaged: Path,
    model: Path,
    tmp_path: Path,
    flags: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = damaged / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert run_cli(monkeypatch, arguments(damaged, model, tmp_path / "run", **flags)) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "manifest.json" in error
    assert "99" in error


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_left_out_named_once_and_counted(
    train: Train, damaged: Path, damage: Damage, capsys: pytest.CaptureFixture[str]
) -> None:
    said = damage(damaged)
    out = train(on=damaged, skip_bad=True, max_steps=9, batch_size=2, beta=200, lr=1e-5)
    assert capsys.readouterr().out.count(said) == 1
    order = Order((12, 6), seed=0, window=65536)
    bad = [sum(order.state_at(position) < 12 for position in range(2 * step, 2 * step + 2)) for step in range(9)]
    assert sum(bad) == 12
    assert set(bad) == {0, 1, 2}
    assert column(out, "bad_states") == np.cumsum(bad).tolist()
    for number, record in zip(bad, metrics(out), strict=True):
        assert (record["loss"] is None) == (number == 2)
    assert column(out, "skipped_steps")[-1] == bad.count(2)
    summary = json.loads((out / "training.json").read_text())
    assert summary["bad_states"]["total"] == 12
    assert [said in problem for problem in summary["bad_states"]["problems"]] == [True]


def test_what_is_left_is_trained_on_as_if_alone(
    train: Train, with_nan: Path, shards: Path, model: Path, tmp_path: Path, other_unet: Path
) -> None:
    """One step over all states: the mean over those that are left, however it is cut."""
    folder = tmp_path / "without"
    folder.mkdir()
    write_shards(folder, model, [each for number, each in enumerate(samples(shards)) if number != 1], ["taste"])
    options = {"unet": other_unet, "max_steps": 1, "beta": 200, "lr": 1e-5, "max_grad_norm": 0.01}
    without = metrics(train("without-run", on=folder, batch_size=15, **options))[0]
    for name, cut in (("large", {"batch_size": 18}), ("small", {"batch_size": 3, "grad_accum": 6})):
        left = metrics(train(name, on=with_nan, skip_bad=True, **cut, **options))[0]
        assert left["bad_states"] == 3
        for metric, wanted in without.items():
            if metric.startswith(("loss", "grad_norm", "rewards/", "error")):
                assert left[metric] == pytest.approx(wanted, rel=2e-3, abs=2e-5), metric
        one, two = (
            torch.cat([p.flatten() for p in _weights(tmp_path / run).values()]) for run in ("without-run", name)
        )
        before = torch.cat([p.flatten() for p in _weights(other_unet.parent).values()])
        assert (one - two).norm() < 0.05 * (one - before).norm()


def _weights(out: Path) -> dict[str, torch.Tensor]:
    from diffusers import UNet2DConditionModel

    return {n: p.detach() for n, p in UNet2DConditionModel.from_pretrained(out / "unet").named_parameters()}


def test_without_damage_the_flag_changes_nothing(train: Train) -> None:
    plain, skipping = train("plain"), train("skipping", skip_bad=True)
    assert column(plain, "loss") == column(skipping, "loss")
    assert column(skipping, "bad_states") == [0] * 4


def test_the_reference_is_recomputed_without_what_is_bad(train: Train, with_nan: Path) -> None:
    options = {"on": with_nan, "skip_bad": True, "max_steps": 9, "beta": 200, "lr": 1e-5}
    anew = train("anew", reference="recomputed", **options)
    stored = train("stored", reference="stored", **options)
    np.testing.assert_allclose(
        np.array(column(anew, "loss"), dtype=float), np.array(column(stored, "loss"), dtype=float), atol=1e-3
    )


def test_a_shard_that_comes_back_has_no_recomputed_reference(
    train: Train, damaged: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    options = {"skip_bad": True, "max_steps": 9, "beta": 200, "lr": 1e-5, "reference": "recomputed", "save_every": 1}
    away = (damaged / FIRST).rename(tmp_path / FIRST)
    whole = train("whole", on=damaged, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(2))
        assert run_cli(patch, arguments(damaged, model, tmp_path / "run", **options)) == 2
    away.rename(damaged / FIRST)
    capsys.readouterr()
    run = train("run", on=damaged, **options)
    assert capsys.readouterr().out.count(f"{FIRST} has states without a finite reference error") == 1
    for name in ("loss", "grad_norm", "bad_states", "skipped_steps"):
        assert column(run, name) == column(whole, name)


def test_held_out_states_are_left_out_too(
    train: Train,
    with_nan: Path,
    shards: Path,
    model: Path,
    tmp_path: Path,
    other_unet: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = [sample for sample in samples(shards) if sample.meta.pair_id != "pair-1"]
    folder = tmp_path / "without"
    folder.mkdir()
    write_shards(folder, model, kept, ["taste"])
    broken = next(sample.meta.prompt for sample in samples(shards) if sample.meta.pair_id == "pair-1")
    fraction = prompt_draw(broken) + 1e-9
    held_out = [sample.meta.prompt for sample in kept if prompt_draw(sample.meta.prompt) < fraction]
    assert 0 < len(held_out) < len(kept)
    options = {"unet": other_unet, "val_fraction": fraction, "max_steps": 1, "lr": 0, "beta": 200}
    without = metrics(train("alone", on=folder, **options))[0]
    capsys.readouterr()
    out = train(on=with_nan, skip_bad=True, **options)
    assert capsys.readouterr().out.count("x0 is not finite") == 1
    for name in ("val/loss", "val/rewards/margins", "val/error/image_1"):
        assert metrics(out)[0][name] == pytest.approx(without[name], rel=1e-4)
    summary = json.loads((out / "training.json").read_text())["bad_states"]
    assert summary["total"] == 0  # of those that are trained on
    assert len(summary["problems"]) == 1


def test_a_run_goes_on_with_the_flag_and_counts_on(
    train: Train, with_nan: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 9, "save_every": 1, "beta": 200, "lr": 1e-5}
    # The first bad state ends the run; the same command with the flag goes on from its last checkpoint.
    assert run_cli(monkeypatch, arguments(with_nan, model, tmp_path / "run", **options)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(7))
        assert run_cli(patch, arguments(with_nan, model, tmp_path / "run", skip_bad=True, **options)) == 2
    run = train("run", on=with_nan, skip_bad=True, **options)
    whole = train("whole", on=with_nan, skip_bad=True, **options)
    for name in ("loss", "grad_norm", "bad_states", "step"):
        assert column(run, name) == column(whole, name)
    assert column(whole, "bad_states")[-1] == 3
    summaries = [json.loads((out / "training.json").read_text())["bad_states"] for out in (run, whole)]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("name", sorted(objectives()))
def test_a_stand_in_adds_exactly_nothing(name: str) -> None:
    batch = collate([stand_in("gone", LATENT_SHAPE)])
    assert batch.problems == ["gone"]
    assert not batch.counts_B.any()
    kind = objectives()[name]
    objective = kind(kind.Options(beta=2000.0))
    error_B2 = torch.tensor([[0.3, 0.3]], requires_grad=True)
    pairs = PairBatch(error_B2, batch.ref_error_B2, batch.preference_B, batch.label_B, batch.timestep_B)
    loss = (objective(pairs)[0] * batch.weight_B).sum()
    loss.backward()
    assert loss.item() == 0
    assert error_B2.grad is not None
    assert error_B2.grad.tolist() == [[0, 0]]


@pytest.mark.long
def test_two_processes_equal_one(train: Train, with_nan: Path, model: Path, tmp_path: Path) -> None:
    options = {"max_steps": 5, "beta": 200, "lr": 1e-5, "skip_bad": True}
    one = train("one", on=with_nan, batch_size=4, **options)
    two = launch_two(arguments(with_nan, model, tmp_path / "two", batch_size=2, **options))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("x0 is not finite") == 1
    assert column(tmp_path / "two", "bad_states") == column(one, "bad_states")
    assert column(one, "bad_states")[-1] >= 3
    for name in ("loss", "grad_norm", "rewards/margins"):
        np.testing.assert_allclose(column(tmp_path / "two", name), column(one, name), rtol=1e-3, atol=1e-4)
