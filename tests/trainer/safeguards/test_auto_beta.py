"""A beta that follows the margins, against the rule written out, and in a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.objectives import find_objective
from smpo_trainer.safeguards.auto_beta import RANGE, AutoBeta, Band, BetaController
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, metrics, resolve_settings


def plain(margins: list[float], start: float, low: float, high: float, rate: float) -> list[float]:
    """Betas of the steps, and of the one after them, for these root mean squares of the margins."""
    betas, mean_log = [start], None
    for margin in margins:
        beta = betas[-1]
        log = math.log(margin) - math.log(beta)
        mean_log = log if mean_log is None else 0.9 * mean_log + 0.1 * log
        margin_now = beta * math.exp(mean_log)
        if margin_now < low:
            beta *= min(low / margin_now, rate)
        elif margin_now > high:
            beta *= max(high / margin_now, 1 / rate)
        betas.append(beta)
    return betas


def test_it_is_the_rule_written_out() -> None:
    margins = [0.1, 0.4, 3.0, 2.5, 1.0, 0.9, 5.0, 7.0, 0.05, 1.4]
    control, betas = BetaController(500, Band(0.8, 1.2), 1.1, warmup_steps=0), [500.0]
    for step, margin in enumerate(margins, start=1):
        control.update(step, margin)
        betas.append(control.beta)
    assert betas == pytest.approx(plain(margins, 500, 0.8, 1.2, 1.1), rel=1e-12)
    assert len(set(betas)) > 5


@pytest.mark.parametrize("start", [100.0, 2000.0, 30_000.0])
def test_from_any_start_the_margins_reach_the_band(start: float) -> None:
    control, unit = BetaController(start, Band(0.5, 2.0), 1.05, warmup_steps=10), 0.0
    for step in range(1, 300):
        before, unit = control.beta, 5e-4 * (1 + 0.3 * math.sin(step))
        control.update(step, unit * before)
        assert 1 / 1.05 - 1e-12 <= control.beta / before <= 1.05 + 1e-12
        assert step > 10 or control.beta == start
    assert 0.4 < 5e-4 * control.beta < 2.2


def test_it_is_limited_and_ignores_steps_without_margins() -> None:
    control = BetaController(1.0, Band(0.5, 2.0), 10.0, warmup_steps=0)
    for margin in (None, 0.0, math.inf, math.nan):
        control.update(1, margin)
        assert control.beta == 1.0
    for step in range(1, 9):
        control.update(step, 1e-12)
    assert control.beta == RANGE
    restored = BetaController(1.0, Band(0.5, 2.0), 10.0, warmup_steps=0)
    restored.load_state_dict(control.state_dict())
    for each in (control, restored):
        each.update(9, 700.0)
    assert restored.state_dict() == control.state_dict()


@pytest.mark.parametrize("text", ["automatic", "auto:", "auto:0", "auto:-1", "auto:inf", "auto:x", "x", "1:2", ""])
def test_a_wrong_beta_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=f"^--beta {text}: expected a number, auto, or auto:START"):
        AutoBeta.parse(text)


@pytest.mark.parametrize("text", ["", "1", "2:1", "0:1", "a:b", "1:2:3", "1:inf"])
def test_a_wrong_band_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=f"^--beta-band {text}: expected LOW:HIGH"):
        Band.parse(text)


def test_a_config_file_keeps_it(shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = arguments(shards, model, tmp_path / "run", beta="auto:300", beta_band="0.3:1")
    resolve_settings(monkeypatch, run).write(tmp_path)
    loss = resolve_settings(monkeypatch, ["--config", str(tmp_path / "config.yaml")]).loss
    assert (loss.beta, loss.beta_band) == (AutoBeta(300.0), Band(0.3, 1.0))


@pytest.mark.parametrize("objective", ["ipo", "capo", "dmpo", "mapo", "sft", "linear-dpo"])
def test_losses_without_a_sigmoid_refuse_it(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    assert not find_objective(objective).has_sigmoid()
    run = arguments(shards, model, tmp_path / "run", objective=objective, beta="auto")
    with pytest.raises(UserError, match=f"^--beta auto: the loss of --objective {objective} has no sigmoid"):
        resolve_experiment(resolve_settings(monkeypatch, run), print)


def test_it_is_not_combined_with_a_schedule(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arguments(shards, model, tmp_path / "run", beta="auto", beta_decay="1:2:0.5")
    with pytest.raises(UserError, match="^--beta auto: beta follows the margins or --beta-decay, not both"):
        resolve_experiment(resolve_settings(monkeypatch, run), print)


@pytest.mark.slow
def test_each_step_has_the_beta_that_the_margins_before_it_gave(train: Train, other_unet: Path) -> None:
    same = {"unet": other_unet, "lr": 0, "objective": "dpo", "max_steps": 4, "val_fraction": 0.3, "val_every": 4}
    out = train("auto", beta="auto:400", beta_band="3:4", beta_rate=1.5, warmup_steps=1, **same)
    margins, betas = column(out, "rewards/margins_rms"), column(out, "beta")
    assert betas[:2] == [400, 400]
    assert betas[1:] == pytest.approx(plain(margins[1:3], 400, 3, 4, 1.5), rel=1e-12)
    assert betas[3] != 400
    fixed = train("fixed", beta=betas[3], **same)
    for name in ("loss", "val/loss"):
        assert metrics(fixed)[3][name] == metrics(out)[3][name]
