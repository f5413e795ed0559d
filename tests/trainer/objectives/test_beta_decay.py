"""The schedule of beta (``--beta-decay``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_trainer.beta_decay import BetaDecay
from smpo_trainer.experiment import resolve_experiment
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, column, resolve_settings


def test_the_factor_by_hand() -> None:
    """1/2 + (1 + cos(pi (n - 100) / 200)) / 4 between 100 and 300."""
    decay = BetaDecay.parse("100:300:0.5")
    steps = {1: 1, 50: 1, 100: 1, 150: 0.92678, 200: 0.75, 250: 0.57322, 300: 0.5, 1000: 0.5}
    assert [decay.factor(step) for step in steps] == pytest.approx(list(steps.values()), abs=5e-6)


@pytest.mark.parametrize("text", ["", "100", "100:200", "a:200:0.5", "1.5:2:0.5", "-1:2:0.5", "2:2:0.5", "0:9:nan"])
def test_a_wrong_schedule_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=f"^--beta-decay {text}: expected N1:N2:END"):
        BetaDecay.parse(text)


@pytest.mark.parametrize("end", [0, -0.5, 1.5])
def test_the_end_is_a_share_of_beta(end: float) -> None:
    with pytest.raises(UserError, match="0 < END <= 1"):
        BetaDecay.parse(f"1:2:{end}")


def test_a_config_file_keeps_it(shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where YAML takes it for a number of base 60 unless it is in quotes."""
    run = arguments(shards, model, tmp_path / "run", beta_decay="10:30:0.5")
    resolve_settings(monkeypatch, run).write(tmp_path)
    settings = resolve_settings(monkeypatch, ["--config", str(tmp_path / "config.yaml")])
    assert settings.loss.beta_decay == BetaDecay(10, 30, 0.5)


@pytest.mark.slow
def test_a_step_is_that_of_its_beta(train: Train, other_unet: Path) -> None:
    """Of margin, logged rewards, budget and held-out pairs: the second step of two has 3/4 of beta, the third half."""
    same = {"unet": other_unet, "lr": 0, "budget": 0.0, "max_steps": 3, "val_fraction": 0.3, "val_every": 1}
    decayed = train("decayed", beta=400, beta_decay="1:3:0.5", **same)
    assert column(decayed, "beta") == [400, 300, 200]
    for step, beta in enumerate((400, 300, 200)):
        plain = train(f"{beta}", beta=beta, **same)
        for name in ("loss", "rewards/chosen", "rewards/margins", "budget/excess", "val/loss"):
            assert column(decayed, name)[step] == column(plain, name)[step]


def test_an_objective_without_beta_refuses_it(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"objective": "sft", "beta_decay": "1:2:0.5"}
    settings = resolve_settings(monkeypatch, arguments(shards, model, tmp_path / "run", **run))
    with pytest.raises(UserError, match="^--beta-decay 1:2:0.5: without --budget, --objective sft has no beta$"):
        resolve_experiment(settings, print)
    settings = resolve_settings(monkeypatch, arguments(shards, model, tmp_path / "run", **run, budget=1))
    assert "--beta-decay 1:2:0.5" in resolve_experiment(settings, print).describe(1)[1]
