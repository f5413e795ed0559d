"""Runs over latents of several shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from smpo_schemas.manifest import Bucket, read_manifest, write_manifest
from smpo_trainer.data.loader import StateBatch
from smpo_trainer.trainer import Trainer
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, make_shards, metrics, run_cli

SHAPES = ((4, 8, 8), (4, 6, 10), (4, 16, 4))


@pytest.fixture(scope="module")
def shaped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """18, 15 and 3 states of three shapes."""
    folder = tmp_path_factory.mktemp("shaped")
    made = []
    for number, (shape, pairs) in enumerate(zip(SHAPES, (6, 5, 1), strict=True)):
        out = make_shards(
            folder / str(number), model, num_pairs=pairs, latent=shape, seed=number, prefix=f"of-{number}"
        )
        bucket = Bucket(height=4 * shape[1], width=4 * shape[2], pairs=pairs)
        write_manifest(out, read_manifest(out).model_copy(update={"buckets": [bucket]}))
        made.append(out)
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[StateBatch]:
    """The micro-batches of training, validation included, in order."""
    batches: list[StateBatch] = []
    forward = Trainer._forward

    def recorded(self: Trainer, batch: StateBatch, pair_loss):
        batches.append(batch)
        return forward(self, batch, pair_loss)

    monkeypatch.setattr(Trainer, "_forward", recorded)
    return batches


@pytest.mark.slow
def test_each_micro_batch_is_of_one_shape_and_all_shapes_come(
    train: Train, shaped: list[Path], seen: list[StateBatch], capfd: pytest.CaptureFixture[str]
) -> None:
    out = train(on=shaped, batch_size=2, grad_accum=2, max_steps=12, lr=1e-10)
    shapes = [tuple(batch.x0_B2Chw.shape[2:]) for batch in seen]
    assert shapes[::2] == shapes[1::2]
    # 12 steps are 48 states: an epoch has 36, of which 3 have the last shape, whose first group is full in the second
    # epoch.
    assert [shapes[::2].count(shape) for shape in SHAPES] == [6, 5, 1]
    for loss in column(out, "loss"):
        assert loss == pytest.approx(math.log(2), abs=2e-3)
    said = " ".join(capfd.readouterr().out.split())
    assert "latents of 3 shapes, in groups of 4 states of the same shape; rarer shapes: 1 (3 states)" in said


@pytest.mark.slow
def test_the_split_of_a_step_changes_nothing(train: Train, shaped: list[Path]) -> None:
    runs = [
        train(f"cut-{batch}", on=shaped, batch_size=batch, grad_accum=accum, max_steps=5, beta=200, lr=1e-5)
        for batch, accum in ((4, 1), (1, 4))
    ]
    for name in ("loss", "grad_norm"):
        assert column(runs[0], name) == pytest.approx(column(runs[1], name), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["stored", "recomputed"])
def test_held_out_states_of_several_shapes(
    train: Train, shaped: list[Path], seen: list[StateBatch], reference: str
) -> None:
    out = train(on=shaped, batch_size=4, max_steps=4, val_fraction=0.4, val_every=2, lr=1e-10, reference=reference)
    last = metrics(out)[-1]
    assert last["val/loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert len({tuple(batch.x0_B2Chw.shape[2:]) for batch in seen}) == 3


@pytest.mark.slow
def test_a_run_resumes_with_another_batch_size_but_not_with_other_groups(
    train: Train, shaped: list[Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(on=shaped, batch_size=4, grad_accum=18, max_steps=1)  # 72 states: groups of 36
    assert train(on=shaped, batch_size=2, grad_accum=36, max_steps=1) == out
    assert "nothing to do" in capfd.readouterr().out
    changed = arguments(shaped, read_manifest(shaped[0]).model.id, out, batch_size=8, grad_accum=9, max_steps=1)
    assert run_cli(monkeypatch, changed) == 2
    assert "states of one shape at a time: 36 there, 72 here" in capfd.readouterr().err
