"""Objectives and the terms that combine with them, through the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from smpo_common.errors import UserError
from smpo_common.files import sha256_file
from smpo_schemas.scoring.scores import ScoresInfo, ScoresPart, write_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.preference.pair_weights import read_pair_weights
from tests.trainer.conftest import Train
from tests.trainer.helpers import PROMPTS, PlainReference, arguments, column, metrics, resolve_settings, run_cli
from tests.trainer.objectives.plain import BETA, PLAIN

PAIRS = 6
DECIDED = ("pair-0", "pair-1", "pair-4", "pair-5")


class State:
    """A state of the shards, with errors in float64."""

    def __init__(self, pair_id: str, label: float | None, p: float, t: int, errors: list[float], ref: list[float]):
        self.pair_id, self.label, self.p, self.t, self.errors, self.ref = pair_id, label, p, t, errors, ref

    def plain_loss(self, name: str, p: float) -> float:
        """``p``: P(image_0 preferred) as the objective takes it."""
        w, loser = (0, 1) if p > 0.5 else (1, 0)
        e, r = (torch.tensor(values, dtype=torch.float64) for values in (self.errors, self.ref))
        return float(PLAIN[name](e[w], e[loser], r[w], r[loser], max(p, 1 - p)))


@pytest.fixture(scope="module")
def states(shards: Path, model: Path, other_unet: Path) -> list[State]:
    plain = PlainReference(model, other_unet)
    states = []
    for sample in ShardDirectory(shards).samples():
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        first, second = sample.meta.scores["taste"]
        p = 1 / (1 + math.exp(second - first))
        for k, t in enumerate(sample.timestep_K.tolist()):
            errors = [plain.error(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt) for i in (0, 1)]
            ref = sample.ref_error_K2[k].double().tolist()
            states.append(State(sample.meta.pair_id, sample.meta.label, p, t, errors, ref))
    return states


def write_scores(folder: Path, pairs: int = PAIRS, **columns: list[object]) -> Path:
    """A scores table of the first pairs, with these columns and a reward."""
    folder.mkdir()
    ids = [f"pair-{number}" for number in range(pairs)]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(pairs)]
    table = pa.table({"pair_id": ids, "prompt": prompts, "taste_0": [1.0] * pairs, "taste_1": [0.0] * pairs} | columns)
    pq.write_table(table, folder / "part-0.parquet")
    part = ScoresPart(name="part-0.parquet", pairs=pairs, sha256=sha256_file(folder / "part-0.parquet"))
    write_scores_info(folder, ScoresInfo(schema_version=1, rewards={}, parts=[part], scored=pairs, rejected=0))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("smpo", "capo", "selfnpo")])
def test_first_loss_of_a_label_objective(train: Train, states: list[State], other_unet: Path, name: str) -> None:
    out = train(objective=name, unet=other_unet, max_steps=1, batch_size=6, grad_accum=2, beta=BETA)
    wanted = np.mean([s.plain_loss(name, s.label) for s in states if s.label in (0, 1)])
    assert column(out, "loss")[0] == pytest.approx(wanted, rel=1e-5)
    assert metrics(out)[0]["rewards/margins"] is not None


def test_first_loss_of_capo_has_the_sigmoid_weight_inside(
    train: Train, states: list[State], model: Path, other_unet: Path
) -> None:
    bias = 1.5  # the best value in CaPO's ablation
    out = train(objective="capo", unet=other_unet, max_steps=1, batch_size=6, grad_accum=3, beta=2000)
    products = PlainReference(model).scheduler.alphas_cumprod.double()
    losses = []
    for state in states:
        weight = 1 / (1 + math.exp(-bias) * float(products[state.t] / (1 - products[state.t])))
        difference = (state.errors[0] - state.errors[1]) - (state.ref[0] - state.ref[1])
        losses.append(((2 * state.p - 1) + 1000 * weight * difference) ** 2)
    assert column(out, "loss")[0] == pytest.approx(np.mean(losses), rel=1e-3)
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert (settings["timestep_weighting"], settings["sigmoid_bias"]) == ("sigmoid", bias)


def test_first_loss_of_selfnpo_is_the_error_of_x0_of_all_images(
    train: Train, states: list[State], model: Path, other_unet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(objective="selfnpo", unet=other_unet, max_steps=1, batch_size=18, x0_cap=50)
    assert f"--model base={model} guided={model} --negative guided={out} --prompts" in capsys.readouterr().out
    products = PlainReference(model).scheduler.alphas_cumprod.double()
    weights = [min(float((1 - products[state.t]) / products[state.t]), 50) for state in states]
    losses = [weight * sum(state.errors) / 2 for weight, state in zip(weights, states, strict=True)]
    assert (len(losses), metrics(out)[0]["rewards/margins"]) == (18, None)
    assert column(out, "loss")[0] == pytest.approx(np.mean(losses), rel=1e-5)
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert (settings["timestep_weighting"], settings["x0_cap"]) == ("x0", 50)


def test_selfnpo_refuses_a_budget(shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = resolve_settings(monkeypatch, arguments(shards, model, tmp_path, objective="selfnpo", budget=1.0))
    with pytest.raises(UserError, match="--budget 1: --objective selfnpo prefers no image"):
        resolve_experiment(settings, print)


def test_only_capo_has_a_bias_of_its_own(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bias(**options: object) -> object:
        run = arguments(shards, model, tmp_path / "run", timestep_weighting="sigmoid", **options)
        settings = resolve_settings(monkeypatch, run)
        return resolve_experiment(settings, print).weighting.identity()["sigmoid_bias"]

    assert bias(objective="capo") == 1.5
    assert bias(objective="dpo") == 0
    assert bias(objective="capo", sigmoid_bias=0) == 0


def test_kept_ties_are_trained_on(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(objective="dpo", objective_option=["ties=keep", "label_smoothing=0.1"], max_steps=1)
    assert "15 of 18 states of 6 trajectories" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mapo", "capo", "sft"])
def test_accumulation_equals_a_large_batch(train: Train, other_unet: Path, name: str) -> None:
    # Adam turns rounding of gradients near 0 into full steps; a small learning rate keeps that below the tolerance.
    # Start from other weights than the reference, where the hinge of the budget is at its edge.
    gentle = {"objective": name, "beta": 200, "lr": 1e-6, "max_steps": 3, "budget": 0.0, "unet": other_unet}
    large = train("large", batch_size=8, **gentle)
    small = train("small", batch_size=1, grad_accum=8, **gentle)
    for metric in ("loss", "grad_norm", "rewards/margins", "budget/excess"):
        np.testing.assert_allclose(column(small, metric), column(large, metric), rtol=1e-3, atol=1e-5)


def test_pair_weights_come_from_the_scores_table(
    train: Train, tmp_path: Path, states: list[State], other_unet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = write_scores(tmp_path / "scores", trust=[2.0, 0.5, 1.0, 1.0, 0.0, None])
    run = {"objective": "dpo", "scores": scores, "weight_column": "trust", "unet": other_unet, "beta": BETA}
    out = train(**run, max_steps=1, batch_size=6)
    said = capsys.readouterr().out
    assert "2 of 6 trajectories without a weight in trust" in said
    assert "6 of 18 states of 6 trajectories" in said
    weights = {"pair-0": 2.0, "pair-1": 0.5}
    wanted = [weights[s.pair_id] * s.plain_loss("dpo", s.label) for s in states if s.pair_id in weights]
    assert column(out, "loss")[0] == pytest.approx(np.mean(wanted), rel=1e-5)


def test_rows_that_repeat_a_pair_must_agree(tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", trust=[1.0] * PAIRS)
    rows = pq.read_table(scores / "part-0.parquet").to_pylist()
    for change in ({}, {"trust": 2.0}, {"prompt": "another"}):
        repeated = [*rows[:-1], {**rows[0], **change}]
        pq.write_table(pa.Table.from_pylist(repeated), scores / "part-0.parquet")
        if not change:
            assert read_pair_weights(scores, "trust").table["pair-0"] == (PROMPTS[0], 1)
        else:
            with pytest.raises(UserError, match="pair pair-0 has several weights or prompts"):
                read_pair_weights(scores, "trust")


@pytest.mark.slow
def test_equal_weights_change_nothing(train: Train, tmp_path: Path) -> None:
    scores = write_scores(tmp_path / "scores", trust=[1] * PAIRS)
    weighted = train("weighted", objective="dpo", scores=scores, weight_column="trust")
    assert column(weighted, "loss") == column(train("plain", objective="dpo"), "loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective_option": ["label_smoothing"]}, "--objective-option label_smoothing: expected NAME=VALUE"),
        ({"objective_option": ["ties=keep", "ties=drop"]}, "--objective-option ties is given twice"),
        ({"objective_option": ["ties=keep"]}, "--objective smpo has no such option; it has none"),
        (
            {"weight_column": "trust"},
            "--weight-column trust names a column of a scores table: give the table with --scores DIR",
        ),
    ],
)
def test_wrong_flags(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
    message: str,
) -> None:
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", **options)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -1.0, 1, 1, 1, 1], "pair pair-1 in"),
        (["a"] * 6, "has the weight 'a'"),
        (None, "--weight-column trust: not a column of"),
    ],
)
def test_wrong_weights(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    values: list[object] | None,
    message: str,
) -> None:
    scores = write_scores(tmp_path / "scores", **({} if values is None else {"trust": values}))
    run = arguments(shards, model, tmp_path / "run", objective="dpo", scores=scores, weight_column="trust")
    assert run_cli(monkeypatch, run) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_table_of_weights_is_one_line(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = write_scores(tmp_path / "scores", trust=[1.0] * PAIRS)
    part = scores / "part-0.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    run = arguments(shards, model, tmp_path / "run", objective="dpo", scores=scores, weight_column="trust")
    assert run_cli(monkeypatch, run) == 2
    assert capsys.readouterr().err.startswith(f"error: {part} cannot be read: ")


def test_weights_of_other_pairs_are_refused(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As with --scores, though dpo only needs the weights of the table."""
    prompts: list[object] = ["of another data set", *PROMPTS[1:], PROMPTS[0]]
    scores = write_scores(tmp_path / "scores", trust=[1.0] * PAIRS, prompt=prompts)
    run = arguments(shards, model, tmp_path / "run", objective="dpo", scores=scores, weight_column="trust")
    assert run_cli(monkeypatch, run) == 2
    error = capsys.readouterr().err
    assert f"--scores {scores}" in error
    assert "pair-0 is 'of another data set'" in error
    assert "'a cat'" in error


def test_each_setting_is_part_of_the_runs_identity(
    train: Train,
    tmp_path: Path,
    shards: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = write_scores(tmp_path / "scores", trust=[1.0] * PAIRS)
    out = train(objective="dpo", max_steps=1)
    changes = {
        "objective": ("npo", "objective: dpo there, npo here"),
        "objective_option": (["label_smoothing=0.1"], "label_smoothing: 0.0 there, 0.1 here"),
        "timestep_weighting": (
            "min-snr",
            "timestep_weighting: uniform there, min-snr here; snr_gamma: None there, 5.0 here",
        ),
        "budget": (1, "budget: None there, 1.0 here; budget_weight: None there, 1.0 here"),
        "weight_column": ("trust", "weight_column: None there, "),
    }
    for name, (value, message) in changes.items():
        extra = {"scores": scores} if name == "weight_column" else {}
        changed = {"objective": "dpo", "max_steps": 1, name: value, **extra}
        assert run_cli(monkeypatch, arguments(shards, model, out, **changed)) == 2
        assert message in capsys.readouterr().err
    # Flags without effect here may change.
    train(objective="dpo", max_steps=1, snr_gamma=7, sigmoid_bias=1, budget_weight=3)
    assert "finished; nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_makes_every_objective_use_the_reference(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"objective": "sft", "dtype": "bf16", "max_steps": 1, "batch_size": 12}
    assert "reference_noise/std" not in metrics(train("without", **options))[0]
    train("without-live", reference="live", **options)
    said = capsys.readouterr().out
    assert "needs no reference" in said
    assert "recomputing" not in said
    first = metrics(train("with", budget=0, **options))[0]
    assert abs(first["reference_noise/loss"]) > 5e-3
    # The reference is recomputed, so that the run starts at the edge of the budget.
    assert first["budget/excess"] == pytest.approx(0, abs=1e-4)
    train("with-live", budget=0, reference="live", **options)
    said = capsys.readouterr().out
    assert "recomputing the reference errors" in said
    assert "needs no reference" not in said


def test_objectives_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, ["--list-objectives"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{said}" for name in PLAIN)
    assert "label_smoothing" in said
