"""Remarks on departures from the published settings of an objective or preset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from smpo_trainer.experiment import resolve_experiment
from smpo_trainer.remarks import remarks
from tests.trainer.helpers import arguments, make_shards, resolve_settings, with_manifest
from tests.trainer.objectives.test_transition import with_steps
from tests.trainer.preference.test_reward_mix import table

Said = Callable[..., list[str]]


@pytest.fixture
def said(shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Said:
    """The remarks on a run of these flags."""

    def run(*, on: Path | list[Path] = shards, states_per_step: int = 2, **options: object) -> list[str]:
        settings = resolve_settings(monkeypatch, arguments(on, model, tmp_path / "run", **options))
        return remarks(resolve_experiment(settings, lambda _: None), states_per_step)

    return run


def test_published_settings_need_no_remark(said: Said) -> None:
    assert said() == []
    assert said(objective="dpo") == []


def test_self_npo_on_shards_of_another_source(said: Said, shards: Path, tmp_path: Path) -> None:
    published = {"source": "truncated", "steps": 25, "truncated_steps": 5, "guidance_scale": 0.0, "prompt_dropout": 0.0}
    (line,) = said(preset="selfnpo-sd15")
    assert "published with shards of --source truncated --steps 25 --guidance-scale 0 --prompt-dropout 0; here" in line
    (line,) = said(
        preset="selfnpo-sd15", on=with_manifest(shards, tmp_path / "few", **published | {"truncated_steps": 3})
    )
    assert "--truncated-steps 5; here --truncated-steps 3" in line
    assert said(preset="selfnpo-sd15", on=with_manifest(shards, tmp_path / "as", **published)) == []
    (line,) = said(objective="selfnpo")
    assert "--source truncated --prompt-dropout 0; here --source renoise" in line


def test_step_pairs_with_another_weighting(said: Said, shards: Path, tmp_path: Path) -> None:
    on = with_steps(shards, tmp_path / "steps", [1, 51], eta=1.0)
    (line,) = said(objective="ipo", on=on)
    assert line == "--timestep-weighting uniform: that of step pairs' likelihoods is transition"
    assert said(objective="ipo", on=on, timestep_weighting="transition") == []


@pytest.mark.parametrize("objective", ["npo", "mapo"])
def test_shards_with_dropped_prompts(said: Said, shards: Path, tmp_path: Path, objective: str) -> None:
    (line,) = said(objective=objective)
    assert f"--objective {objective}" in line
    assert "--source forward --prompt-dropout 0" in line
    assert "--source renoise --prompt-dropout 0.2" in line
    assert (
        said(objective=objective, on=with_manifest(shards, tmp_path / "as", source="forward", prompt_dropout=0.0)) == []
    )
    (line,) = said(objective=objective, on=with_manifest(shards, tmp_path / "other", prompt_dropout=0.0))
    assert "--prompt-dropout" not in line


def test_capo_with_the_same_noise_for_both_images(said: Said, shards: Path, tmp_path: Path) -> None:
    published, _ = said(objective="capo", on=with_manifest(shards, tmp_path / "forward", source="forward"))
    assert "--forward-noise image; here --forward-noise pair" in published


def test_capo_with_a_scale_that_makes_its_targets_small(said: Said, model: Path, tmp_path: Path) -> None:
    """CaPO uses log-odds unscaled, and the mean win rate of several rewards."""
    two = with_manifest(
        make_shards(tmp_path / "two", model, num_pairs=6, num_states=2, rewards=("taste", "sharpness")),
        tmp_path / "forward",
        source="forward",
        forward_noise="image",
    )
    both = {"reward": ["taste", "sharpness"], "objective": "capo", "on": two}
    scale, mean = said(**both)
    assert "--preference minmax" in scale
    assert "taste, sharpness" in scale
    assert "--reward-range" in scale
    assert "--preference winrate" in mean
    (scale,) = said(objective="capo", on=two, reward=["taste"])
    assert "sharpness" not in scale
    assert said(objective="capo", on=two, reward=["taste"], reward_range=["taste=raw"]) == []
    win_rates = {**both, "preference": "winrate", "scores": table(tmp_path / "scores", two)}
    (scale,) = said(**win_rates, reward_range=["taste=0:0.01"])
    assert "sharpness" in scale
    assert "taste" not in scale
    assert said(**win_rates, reward_range=["taste=0:0.01", "sharpness=raw"]) == []


def test_a_preset_with_other_shards_and_another_start(said: Said, shards: Path, tmp_path: Path) -> None:
    lines = said(preset="inpo-sd15", batch_size=1, grad_accum=128)
    assert all(line.startswith("--preset inpo-sd15: ") for line in lines)
    states, start, made = lines
    assert "published with 1024 states per step, this run has 2" in states
    assert "--objective sft" in start
    assert "--unet" in start
    assert "--timesteps published --steps 10 --solver ddim --eta 0.1; here" in made
    assert "--timesteps jittered --steps 9 --solver renoise --eta 0" in made
    published = {"timesteps": "published", "steps": 10, "eta": 0.1}
    for solver in ({"solver": "ddim"}, {"renoise_steps": 0}):
        on = with_manifest(shards, tmp_path / "-".join(solver), **published, **solver)
        assert said(preset="inpo-sd15", on=on, unet=tmp_path, states_per_step=1024) == []


def test_a_preset_for_another_model_and_reward(said: Said, shards: Path, tmp_path: Path) -> None:
    on = with_manifest(shards, tmp_path / "published", timesteps="published", steps=10)
    kind, states, reward = said(preset="smpo-sdxl", on=on)
    assert "sdxl" in kind
    assert "sd15" in kind
    assert "published with 1024 states per step, this run has 2" in states
    assert "--scale-lr" in states
    assert "pickscore" in reward
    assert "taste" in reward
    assert said(preset="smpo-sdxl", on=with_manifest(on, tmp_path / "xl", kind="sdxl"), states_per_step=1024) == [
        reward
    ]


def test_a_preset_for_noise_tracked_pairs_and_another_number_of_steps(said: Said, shards: Path) -> None:
    kind, reward, decay, made = said(preset="pnapo-sd3", max_steps=400)
    assert "published for sd3 models" in kind
    assert "published with the reward hpsv2 alone, this run has: taste" in reward
    assert "--beta-decay 100:200:0.5 is for a run of 200 steps, this one has 400" in decay
    assert "published with shards of --source tracked; here --source renoise" in made
    own = said(preset="pnapo-sd3", max_steps=400, beta_decay="200:400:0.5")
    assert own == [kind, reward, made]


def test_all_directories_are_compared(said: Said, shards: Path, model: Path, tmp_path: Path) -> None:
    more = make_shards(tmp_path / "more", model, num_pairs=1, prefix="more")
    forward = with_manifest(shards, tmp_path / "forward", source="forward", prompt_dropout=0.0)
    (line,) = said(objective="npo", on=[forward, more])
    assert "here --source forward --prompt-dropout 0, --source renoise --prompt-dropout 0.2" in line
