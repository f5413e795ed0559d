"""Health warnings: on artificial records, and in tiny runs that are made to fail."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.samples import Sample
from smpo_trainer.monitoring.health import Health
from smpo_trainer.monitoring.metrics import Record
from smpo_trainer.output.checkpoints import Checkpoints
from tests.trainer.conftest import Train
from tests.trainer.helpers import PlainReference, arguments, dying_after, make_shards, run_cli, write_shards

WARM_UP = 5
STEPS = 60


def good(step: int) -> Record:
    """The record of a good run, like that of the demo."""
    record: Record = {
        "step": step,
        "loss": 0.7 - 0.2 * step / STEPS,
        "rewards/accuracies": 0.5 + 0.25 * step / STEPS,
        "rewards/margins": 1.0 * step / STEPS,
        "error_minus_reference/chosen": 0.002,
        "error_minus_reference/rejected": 0.006,
    }
    for image in (0, 1):
        record[f"error/image_{image}"] = 0.024
        record[f"error_minus_reference/image_{image}"] = 0.004
    for band, margin in (("0-249", 1.2), ("250-499", 1.4), ("500-749", 0.9), ("750-999", 0.2)):
        record[f"rewards/margins/t{band}"] = margin * step / STEPS
    if step % 10 == 0:
        record["val/rewards/accuracies"] = 0.5 + 0.2 * step / STEPS
    return record


def warnings_of(change: Callable[[int], Record], *, steps: int = STEPS, **settings: float | bool) -> list[str]:
    """Warnings of a run of good records with changes."""
    known = {"warmup_steps": WARM_UP, "states_per_step": 50, "num_held_out": 500, "num_train_timesteps": 1000}
    health = Health(**{**known, "uses_reference": True, **settings})  # type: ignore[arg-type]
    warnings = [warning for step in range(1, steps + 1) for warning in health.check(good(step) | change(step))]
    assert warnings == health.warnings
    return warnings


def evaluated(values: Callable[[int], float], step: int) -> Record:
    return {"val/rewards/accuracies": values(step)} if step % 10 == 0 else {}


def memorising(step: int) -> Record:
    return {"loss": 0.7 if step < 20 else 0.05, "rewards/accuracies": 0.95} | evaluated(lambda _: 0.6, step)


def exploding(step: int) -> Record:
    return {"rewards/margins": 30.0 * (-1) ** step}


def guessing(step: int) -> Record:
    return evaluated(lambda number: 0.5 + 0.02 * (-1) ** (number // 10), step)


def guessing_in_training(step: int) -> Record:
    return {"rewards/accuracies": 0.5 + 0.1 * (-1) ** step, "val/rewards/accuracies": None}


def one_band(step: int) -> Record:
    return {f"rewards/margins/t{band}": 0.05 for band in ("0-249", "250-499", "500-749")} | {
        "rewards/margins/t750-999": 0.7
    }


def saturating(_step: int) -> Record:
    return {"saturated": 0.8, "gradient_factor": 0.1}


def still(_step: int) -> Record:
    return {"rewards/margins_rms": 0.01, "gradient_factor": 0.5}


NO_HELD_OUT = {"num_held_out": 0}


@pytest.mark.parametrize(
    ("change", "settings", "wanted"),
    [
        (memorising, {}, "the run memorises its pairs: the training loss is near 0 (0.05, at first 0.7)"),
        (exploding, {}, "margins explode (mean 30 over 20 steps"),
        (guessing, {}, "the implicit accuracy on held-out pairs is at chance after the warm-up (0.50 over 500 states)"),
        (guessing_in_training, NO_HELD_OUT, "the implicit accuracy in training is at chance after the warm-up (0.50"),
        (saturating, {}, "the sigmoid is saturated for 80% of the states (mean gradient factor 0.1, at the reference"),
        (one_band, {}, "one band of timesteps dominates (t 750 to 999 has 82% of the margin)"),
    ],
)
def test_each_failure_is_warned_of_once(
    change: Callable[[int], Record], settings: dict[str, float], wanted: str
) -> None:
    (warning,) = warnings_of(change, **settings)
    assert warning.startswith(wanted)


@pytest.mark.parametrize("settings", [{}, NO_HELD_OUT])
def test_a_good_run_is_silent(settings: dict[str, float]) -> None:
    assert warnings_of(lambda _: {}, **settings) == []


@pytest.mark.parametrize("change", [exploding, guessing_in_training, one_band])
def test_early_steps_are_not_judged(change: Callable[[int], Record]) -> None:
    assert warnings_of(change, steps=WARM_UP + 19, **NO_HELD_OUT) == []
    assert warnings_of(change, steps=STEPS, warmup_steps=STEPS - 19, **NO_HELD_OUT) == []
    assert len(warnings_of(change, steps=WARM_UP + 20, **NO_HELD_OUT)) == 1


def test_a_model_that_does_not_move_is_noticed_late() -> None:
    assert warnings_of(still, steps=WARM_UP + 99) == []
    (warning,) = warnings_of(still, steps=WARM_UP + 110)
    assert warning.startswith("margins stay near 0 (rms 0.01 after 100 steps)")
    assert warnings_of(lambda _: {"rewards/margins_rms": 0.03}, steps=WARM_UP + 110) == []


def test_accuracies_and_bands_wait_for_enough_states() -> None:
    for change in (guessing_in_training, one_band):
        assert warnings_of(change, states_per_step=20, steps=WARM_UP + 49, **NO_HELD_OUT) == []
        assert len(warnings_of(change, states_per_step=20, steps=WARM_UP + 50, **NO_HELD_OUT)) == 1
    assert warnings_of(guessing, steps=39) == []
    assert len(warnings_of(guessing, steps=40)) == 1


def test_harmless_runs_that_look_alike_are_silent() -> None:
    # The errors of both images rise: such runs gained most in our measurements.
    assert warnings_of(lambda _: {f"error_minus_reference/{image}": 0.05 for image in ("chosen", "rejected")}) == []
    # A loss near 0 that generalises.
    assert warnings_of(lambda step: memorising(step) | evaluated(lambda number: 0.6 + 0.3 * number / STEPS, step)) == []
    # A loss without a least value, like that of linear-dpo.
    assert warnings_of(lambda step: memorising(step) | {"loss": -0.01 if step < 20 else -0.05}) == []
    # Bands without states are the user's choice.
    alone = {f"rewards/margins/t{band}": None for band in ("0-249", "250-499", "500-749")}
    assert warnings_of(lambda step: one_band(step) | alone) == []
    # The margin is too small to compare bands.
    tiny = {f"rewards/margins/t{band}": 1e-5 for band in ("0-249", "250-499", "500-749")}
    assert warnings_of(lambda _: tiny | {"rewards/margins/t750-999": 0.01}) == []
    # Objectives that do not train a margin against the reference.
    for change in (exploding, guessing, one_band):
        assert warnings_of(change, uses_reference=False) == []


def test_steps_without_values_are_left_out() -> None:
    empty = dict.fromkeys(good(1))
    assert warnings_of(lambda step: (empty | {"step": step}) if step % 2 else {}) == []
    assert warnings_of(lambda step: empty | {"step": step}) == []
    assert len(warnings_of(lambda step: (empty | {"step": step}) if step % 2 else exploding(step))) == 1


OFFSET = 2.0
"""Distance of the latents of preferred images from those of the others, which makes tiny pairs learnable."""


def learnable(folder: Path, source: Path, model: Path, *, shuffled: bool) -> Path:
    """Shards in which the latents of preferred images lie on one side of 0; shuffled: with random labels."""
    plain = PlainReference(model)
    coin = np.random.default_rng(1)

    def changed() -> Iterator[Sample]:
        for sample in ShardDirectory(source).samples():
            label = sample.meta.label
            assert label is not None
            side = (1 if label else -1) * torch.tensor([1.0, -1.0])
            x0 = (0.3 * sample.x0_2Chw + OFFSET / 2 * side[:, None, None, None]).half()
            prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
            errors = [
                [plain.error(x0[i], sample.noise_K2Chw[k, i], int(t), prompt) for i in (0, 1)]
                for k, t in enumerate(sample.timestep_K)
            ]
            meta = sample.meta.model_copy(update={"label": float(coin.integers(2))}) if shuffled else sample.meta
            yield replace(sample, meta=meta, x0_2Chw=x0, ref_error_K2=torch.tensor(errors))

    folder.mkdir()
    write_shards(folder, model, list(changed()), ["taste"])
    return folder


@pytest.fixture(scope="module")
def source(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("source") / "shards", model, num_pairs=20)


@pytest.fixture(scope="module")
def sided(model: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learnable(tmp_path_factory.mktemp("sided") / "shards", source, model, shuffled=False)


GENTLE = {"objective": "dpo", "beta": 20, "lr": 1e-4, "batch_size": 4, "max_steps": 25, "warmup_steps": 2}
HELD_OUT = {"val_fraction": 0.4, "val_every": 5}


def warnings(out: Path) -> list[str]:
    return json.loads((out / "training.json").read_text())["warnings"]


@pytest.mark.slow
def test_a_good_tiny_run_is_silent(train: Train, sided: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(on=sided, **GENTLE, **HELD_OUT)
    assert warnings(out) == []
    assert "WARNING" not in capsys.readouterr().out
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/rewards/accuracies"] > 0.8  # it has learned


EXPLODING = {"beta": 1e4, "lr": 1e-3}


@pytest.mark.slow
def test_margins_of_a_tiny_run_that_explode(train: Train, sided: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(on=sided, **GENTLE | EXPLODING)
    (warning,) = [warning for warning in warnings(out) if warning.startswith("margins explode")]
    assert capsys.readouterr().out.count(f"WARNING: {warning}") == 1


@pytest.mark.slow
def test_shuffled_labels_are_warned_of(train: Train, source: Path, model: Path, tmp_path: Path) -> None:
    shuffled = learnable(tmp_path / "shuffled", source, model, shuffled=True)
    out = train(on=shuffled, **GENTLE, **HELD_OUT)
    assert any("accuracy on held-out pairs is at chance" in warning for warning in warnings(out))


@pytest.mark.slow
def test_a_resumed_run_warns_like_the_uninterrupted_one(
    train: Train, sided: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**GENTLE, **EXPLODING, "save_every": 6}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(12))
        assert run_cli(patch, arguments(sided, model, tmp_path / "run", **options)) == 2
    run, whole = train("run", on=sided, **options), train("whole", on=sided, **options)
    assert warnings(run) == warnings(whole)
    assert len(warnings(run)) > 0
