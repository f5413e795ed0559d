from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.data.state_table import StateTable, prompt_draw
from smpo_trainer.output.checkpoints import Checkpoints
from smpo_trainer.trainer import Trainer
from smpo_trainer.validation.held_out import sample_evenly
from tests.trainer.conftest import Train
from tests.trainer.helpers import PROMPTS, PlainReference, arguments, column, dying_after, make_shards, metrics, run_cli
from tests.trainer.objectives.plain import BETA, PLAIN
from tests.trainer.objectives.test_objective_flags import write_scores
from tests.trainer.output.test_resume import launch_two

FRACTION = 0.4


def held_prompts(fraction: float = FRACTION) -> set[str]:
    return {p for p in PROMPTS if int(hashlib.sha256(p.encode()).hexdigest()[:12], 16) / 16**12 < fraction}


@pytest.fixture(scope="module")
def many(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 pairs of the five prompts, with decided labels."""
    return make_shards(tmp_path_factory.mktemp("many") / "shards", model, num_pairs=10)


def test_draws_are_uniform_and_depend_on_the_prompt_only() -> None:
    draws = np.array([prompt_draw(f"prompt {number}") for number in range(20_000)])
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert counts.sum() == 20_000
    assert (abs(counts - 2000) < 5 * np.sqrt(2000 * 0.9)).all()
    assert prompt_draw("a cat") == int(hashlib.sha256(b"a cat").hexdigest()[:12], 16) / 16**12


def table(states_of_trajectories: list[int]) -> StateTable:
    trajectory_S = np.repeat(np.arange(len(states_of_trajectories)), states_of_trajectories)
    k_S = np.concatenate([np.arange(count) for count in states_of_trajectories])
    nothing = np.zeros(len(states_of_trajectories))
    fields = StateTable.__dataclass_fields__
    known = {"trajectory_S": trajectory_S, "k_S": k_S, "weight_P": nothing, "prompt_draw_P": nothing}
    return StateTable(**{name: known.get(name, nothing) for name in fields})


def test_a_sample_has_as_many_trajectories_as_possible() -> None:
    of = table([3, 1, 5, 2])
    for number, wanted in ((3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 0, 1, 2, 2, 3])):
        chosen = sample_evenly(of, number)
        assert of.trajectory_S[chosen].tolist() == wanted
        assert len(set(chosen.tolist())) == number
    assert sample_evenly(of, 99).tolist() == list(range(11))
    assert sample_evenly(of, 4).tolist() == sample_evenly(of, 4).tolist()


@pytest.mark.parametrize(("number", "partial_round"), [(317, 317), (1317, 317), (20, 20)])
def test_a_sample_covers_the_table_in_few_stretches(number: int, partial_round: int) -> None:
    of = table([2] * 1000)
    times = np.bincount(of.trajectory_S[sample_evenly(of, number)], minlength=1000)
    assert times.sum() == number
    chosen = np.flatnonzero(times == times.max())
    assert len(chosen) == partial_round
    assert set(times) == {times.max() - 1, times.max()}
    # Every tenth of the trajectories has equally many, in a few stretches, and so in few shards.
    tenths, _ = np.histogram(chosen, bins=10, range=(0, 1000))
    assert (abs(tenths - partial_round / 10) <= 10).all()
    assert 10 <= 1 + (np.diff(chosen) > 1).sum() <= 32


@pytest.mark.parametrize("size", [1, 2, 7, 40, 100])
def test_a_sample_may_have_any_size(size: int) -> None:
    for number in range(1, size + 1):
        assert len(set(sample_evenly(table([1] * size), number).tolist())) == number


def test_no_held_out_prompt_is_trained_on(
    train: Train, many: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    forward = Trainer._forward

    def note(self: Trainer, batch, pair_loss):
        seen[torch.is_grad_enabled()] |= set(batch.pair_ids)
        return forward(self, batch, pair_loss)

    monkeypatch.setattr(Trainer, "_forward", note)
    held = held_prompts()
    assert 0 < len(held) < len(PROMPTS)
    train(on=many, val_fraction=FRACTION, max_steps=10, batch_size=4, val_every=30)
    prompts = {sample.meta.pair_id: sample.meta.prompt for sample in ShardDirectory(many).samples()}
    assert {prompts[pair] for pair in seen[False]} == held
    assert {prompts[pair] for pair in seen[True]} == set(PROMPTS) - held
    number = 3 * sum(prompt in held for prompt in prompts.values())
    assert f"{number} states are held out by their prompts; {number} of them are evaluated" in capsys.readouterr().out


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_values_are_those_of_the_plain_version(
    train: Train, many: Path, model: Path, other_unet: Path, ema_decay: float | None
) -> None:
    """Evaluated with the saved weights."""
    moving = {"lr": 1e-3, "max_steps": 3, "ema_decay": ema_decay}
    out = train(on=many, objective="dpo", unet=other_unet, val_fraction=FRACTION, beta=BETA, **moving)
    plain = PlainReference(model, out / "unet")
    losses, right = [], []
    for sample in ShardDirectory(many).samples():
        if sample.meta.prompt not in held_prompts():
            continue
        prompt = "" if sample.meta.prompt_dropped else sample.meta.prompt
        w = 0 if sample.meta.label == 1 else 1
        for k, t in enumerate(sample.timestep_K.tolist()):
            e = [torch.tensor(plain.error(sample.x0_2Chw[i], sample.noise_K2Chw[k, i], t, prompt)) for i in (w, 1 - w)]
            r = sample.ref_error_K2[k].double()[[w, 1 - w]]
            losses.append(float(PLAIN["dpo"](e[0].double(), e[1].double(), r[0], r[1], 1.0)))
            right.append(e[0] - r[0] < e[1] - r[1])
    record = metrics(out)[-1]
    assert record["val/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert record["val/rewards/accuracies"] == pytest.approx(np.mean(right))


def test_a_nan_loss_is_not_left_out(train: Train, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Trainer._forward

    def break_one(self: Trainer, batch, pair_loss):
        loss_B, values = forward(self, batch, pair_loss)
        return loss_B if torch.is_grad_enabled() else loss_B.index_fill(0, torch.tensor([0]), torch.nan), values

    monkeypatch.setattr(Trainer, "_forward", break_one)
    record = metrics(train(on=many, val_fraction=FRACTION, max_steps=1))[0]
    assert record["val/loss"] is None
    assert record["loss"] is not None


def test_evaluation_does_not_change_the_training(train: Train, many: Path) -> None:
    few = {"on": many, "val_fraction": FRACTION, "val_states": 6}
    often = train("often", **few, val_every=1)
    never = train("never", **few, val_every=99)
    assert column(often, "loss") == column(never, "loss")
    assert [("val/loss" in line) for line in metrics(often)] == [True] * 4
    assert [("val/loss" in line) for line in metrics(never)] == [False, False, False, True]
    one = train("one", **few, val_every=1, batch_size=1, grad_accum=2)
    assert column(one, "val/loss")[0] == pytest.approx(column(often, "val/loss")[0], rel=1e-3)


def test_the_reference_of_held_out_pairs_is_recomputed_too(
    train: Train, many: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"val_fraction": FRACTION, "val_every": 1, "val_states": 12, "beta": 200, "lr": 1e-5, "save_every": 1}
    fewer = {**run, "val_states": 6}
    live = [column(train(name, on=many, reference="live", **of), "val/loss") for name, of in (("a", run), ("b", fewer))]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dying_after(2))
        cut = arguments(many, model, tmp_path / "recomputed", reference="recomputed", **run)
        assert run_cli(patch, cut) == 2
    # A resumed run may evaluate other states.
    recomputed = train("recomputed", on=many, reference="recomputed", **fewer)
    np.testing.assert_allclose(column(recomputed, "val/loss"), live[0][:2] + live[1][2:], atol=1e-5)
    assert [path.name for path in recomputed.glob("reference*")] == [
        "reference.safetensors"
    ]  # of the training states only


@pytest.mark.slow
def test_two_processes_equal_one(train: Train, many: Path, model: Path, other_unet: Path, tmp_path: Path) -> None:
    """With held-out pairs split unevenly, a weight average, and a step that both processes must skip."""
    pairs = len(list(ShardDirectory(many).samples()))
    broken = next(s.meta.pair_id for s in ShardDirectory(many).samples() if s.meta.prompt not in held_prompts())
    trust = [1e300 if f"pair-{number}" == broken else 1.0 for number in range(pairs)]
    scores = write_scores(tmp_path / "scores", pairs=pairs, trust=trust)
    # Start from other weights than the reference, so that no margin's sign depends on rounding.
    run = {"objective": "dpo", "unet": other_unet, "beta": 200, "lr": 1e-5, "ema_decay": 0.9, "max_steps": 5}
    run |= {"val_fraction": FRACTION, "val_states": 5, "val_every": 2, "scores": scores, "weight_column": "trust"}
    one = train("one", on=many, batch_size=4, **run)
    done = launch_two(arguments(many, model, tmp_path / "two", batch_size=2, **run))
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    assert column(two, "skipped_steps") == column(one, "skipped_steps")
    assert 0 < column(one, "skipped_steps")[-1] < 5
    for name in ("loss", "val/loss", "val/rewards/accuracies"):
        ours, theirs = ([line.get(name) for line in metrics(out)] for out in (two, one))
        np.testing.assert_allclose(np.array(ours, dtype=float), np.array(theirs, dtype=float), rtol=1e-3, atol=1e-5)
    lines = [[json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()] for out in (two, one)]
    assert [(x["step"], sorted(x["pairs"])) for x in lines[0]] == [(x["step"], sorted(x["pairs"])) for x in lines[1]]
    # Adam's first step turns rounding of a gradient near 0 into a full step of that weight: compare norms.
    before, ours, theirs = (
        torch.cat([p.detach().flatten() for p in PlainReference(model, unet).unet.parameters()])
        for unet in (other_unet, two / "unet", one / "unet")
    )
    assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


def test_held_out_pairs_are_part_of_the_runs_identity(
    train: Train, many: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(on=many, max_steps=1)
    assert json.loads((out / "training.json").read_text())["states"] == 30
    assert run_cli(monkeypatch, arguments(many, model, out, max_steps=1, val_fraction=FRACTION)) == 2
    assert "val_fraction: 0.0 there, 0.4 here" in capsys.readouterr().err


def test_too_few_prompts(
    many: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert held_prompts(0.001) == set()
    assert run_cli(monkeypatch, arguments(many, model, tmp_path / "run", val_fraction=0.001)) == 2
    assert "--val-fraction 0.001 holds out none of the prompts" in capsys.readouterr().err
