"""Published settings as defaults of the flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smpo_common.errors import UserError
from smpo_common.options import fields_of
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.beta_decay import BetaDecay
from smpo_trainer.experiment import Experiment, resolve_experiment
from smpo_trainer.presets import PRESETS
from smpo_trainer.remarks import remarks
from smpo_trainer.settings import TrainSettings
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, make_shards, resolve_settings, run_cli, with_manifest
from tests.trainer.objectives.test_transition import with_steps
from tests.trainer.preference.test_reward_mix import table

Resolve = Callable[..., Experiment]

DPO = {"scale_lr": True, "lr": 1e-8, "dtype": "fp16", "lora_rank": None}
NPO = {"scale_lr": False, "lr": 5e-6, "lora_rank": 8, "optimizer": "adamw8bit", "warmup_steps": 0, "max_steps": 2000}
SELF_NPO = {"objective": "selfnpo", "max_steps": 1000, "warmup_steps": 500, "optimizer": "adamw8bit", "lora_rank": None}
SD15, SDXL = {"optimizer": "adamw"}, {"optimizer": "adafactor", "gradient_checkpointing": True}
PNAPO = {"objective": "smpo", "gamma": 1, "lr": 1e-6, "scale_lr": False, "optimizer": "adamw"}
PUBLISHED: dict[str, dict[str, object]] = {
    "smpo-sd15": {**DPO, **SD15, "objective": "smpo", "beta": 2000, "gamma": 10, "max_steps": 200, "warmup_steps": 100},
    "smpo-sdxl": {**DPO, **SDXL, "objective": "smpo", "beta": 5000, "gamma": 10, "max_steps": 200, "warmup_steps": 100},
    "dpo-sd15": {**DPO, **SD15, "objective": "dpo", "beta": 2000, "max_steps": 2000, "warmup_steps": 500},
    "dpo-sdxl": {**DPO, **SDXL, "objective": "dpo", "beta": 5000, "max_steps": 2000, "warmup_steps": 200},
    "inpo-sd15": {**DPO, **SD15, "objective": "dpo", "beta": 2000, "max_steps": 400, "warmup_steps": 200},
    "inpo-sdxl": {**DPO, **SDXL, "objective": "dpo", "beta": 5000, "max_steps": 400, "warmup_steps": 200},
    "dmpo-sd15": {**DPO, "objective": "dmpo", "beta": 2000, "max_steps": 2000, "warmup_steps": 500} | {"dtype": "bf16"},
    "dmpo-sdxl": {**DPO, "objective": "dmpo", "beta": 6000, "max_steps": 2000, "warmup_steps": 500}
    | {"dtype": "bf16", "lr": 1e-9},
    "mapo-sdxl": {"objective": "mapo", "lr": 1e-5, "scale_lr": False, "optimizer": "adamw8bit", "max_steps": 2000},
    "capo-sdxl": {"objective": "capo", "preference": "winrate"},
    "npo-sd15": {**NPO, "objective": "npo", "beta": 1000},
    "npo-sdxl": {**NPO, "objective": "npo", "beta": 2000},
    "selfnpo-sd15": {**SELF_NPO, "lr": 1e-6, "weight_decay": 1e-3, "batch_size": 10},
    "selfnpo-sdxl": {**SELF_NPO, "lr": 1e-7, "weight_decay": 0, "batch_size": 5},
    "pnapo-sd3": {**PNAPO, "beta": 5000},
    "pnapo-flux": {**PNAPO, "beta": 2000},
}
"""From the launch scripts and READMEs of the methods' repositories (CaPO, PNAPO: from secondary sources)."""

STATES_PER_STEP = {"smpo": 1024, "dpo": 2048, "inpo": 1024, "dmpo": 2048}
"""On 8 devices."""

SHARDS = {
    "smpo-sd15": {"source": "renoise", "timesteps": "published", "steps": 5, "renoise_steps": 1, "prompt_dropout": 0.2},
    "smpo-sdxl": {"source": "renoise", "timesteps": "published", "steps": 10, "renoise_steps": 1},
    "dpo-sd15": {"source": "forward", "prompt_dropout": 0.2},
    "inpo-sd15": {"source": "renoise", "solver": "ddim", "eta": 0.1, "steps": 10, "prompt_dropout": 0.2},
    "inpo-sdxl": {"source": "renoise", "solver": "ddim", "eta": 0.1, "steps": 10, "prompt_dropout": 0.2},
    "mapo-sdxl": {"source": "forward", "prompt_dropout": 0.0},
    "npo-sdxl": {"source": "forward", "prompt_dropout": 0.0},
    "selfnpo-sd15": {"source": "truncated", "steps": 25, "truncated_steps": 5, "guidance_scale": 0},
    "selfnpo-sdxl": {"truncated_from": "image", "prompt_dropout": 0},
    "pnapo-sd3": {"source": "tracked"},
    "pnapo-flux": {"source": "tracked"},
}


@pytest.fixture
def resolve(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Resolve an experiment from a preset and the data alone."""
    nothing = dict.fromkeys(("max_steps", "batch_size", "warmup_steps", "lr"))

    def run(preset: str, on: Path, **options: object) -> Experiment:
        run = arguments(on, model, tmp_path / "run", preset=preset, **{**nothing, **options})
        return resolve_experiment(resolve_settings(monkeypatch, run), lambda _: None)

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(
    resolve: Resolve, model: Path, shards: Path, tmp_path: Path, name: str
) -> None:
    kind = {"flux": "flux1-dev"}.get(name.split("-")[1], name.split("-")[1])
    on = with_manifest(shards, tmp_path / "shards", kind=kind)
    scores = {"scores": table(tmp_path / "scores", on, names=("taste",))} if name == "capo-sdxl" else {}
    experiment = resolve(name, on, **scores)
    settings = experiment.settings.flat_values()
    assert {field: settings[field] for field in PUBLISHED[name]} == PUBLISHED[name]
    assert (settings["lr_schedule"], settings["max_grad_norm"]) == ("constant", 1.0)
    assert settings["weight_decay"] == PUBLISHED[name].get("weight_decay", 0.01)
    if "beta" in PUBLISHED[name]:  # which is also the default of the objective
        assert experiment.objective.resolve_beta(None, kind) == PUBLISHED[name]["beta"]
    states = STATES_PER_STEP.get(name.split("-", maxsplit=1)[0])
    if states:
        assert settings["batch_size"] * settings["grad_accum"] * 8 == PRESETS[name].states_per_step == states
    assert PRESETS[name].kind == kind
    assert PRESETS[name].shards.items() >= SHARDS.get(name, {}).items()


def test_options_of_single_objectives(resolve: Resolve, shards: Path, tmp_path: Path) -> None:
    assert resolve("dmpo-sd15", shards).objective.options.label_smoothing == 0.01
    mapo = resolve("mapo-sdxl", shards).objective.options
    assert (mapo.margin_weight, mapo.scale) == (0.1, 0.5)
    capo = resolve("capo-sdxl", shards, scores=table(tmp_path / "scores", shards, names=("taste",)))
    assert (capo.weighting.kind, capo.weighting.bias) == ("sigmoid", 1.5)
    pnapo = resolve("pnapo-sd3", shards).settings
    assert pnapo.loss.beta_decay == BetaDecay(pnapo.steps.max_steps // 2, pnapo.steps.max_steps, 0.5)
    npo = resolve("npo-sd15", shards).settings.steps
    assert npo.batch_size * npo.grad_accum == 64
    npo = resolve("npo-sdxl", shards).settings.steps
    assert npo.batch_size * npo.grad_accum == 60


def test_tailorpo(resolve: Resolve, shards: Path, tmp_path: Path) -> None:
    """From its text and D3PO's code."""
    on = with_steps(shards, tmp_path / "steps", [1, 51], steps=20, eta=1.0, guidance_scale=5.0)
    experiment = resolve("tailorpo-sd15", on)
    assert (experiment.objective.name, experiment.objective.options.ratio_clip) == ("dpo", 0.1)
    assert (experiment.objective.options.beta, experiment.weighting.kind) == (0.1, "transition")
    settings = experiment.settings.flat_values()
    assert (settings["lr"], settings["lora_rank"], settings["batch_size"]) == (3e-5, 4, 2)
    assert remarks(experiment, 2) == []
    with pytest.raises(UserError, match="have states of source renoise; it is for step pairs"):
        resolve("tailorpo-sd15", shards)


def test_smpo_uses_the_published_range_of_pickscore(resolve: Resolve, model: Path, tmp_path: Path) -> None:
    """p = sigmoid((r_0 - r_1) / 0.166580): of 0.22 and 0.21 that is sigmoid(0.060031) = 0.515003."""
    on = make_shards(tmp_path / "pick", model, num_pairs=1, rewards=("pickscore",), scores=[(0.22, 0.21)])
    for name in ("smpo-sd15", "smpo-sdxl"):
        mix = resolve(name, on).mix
        assert mix
        (sample,) = ShardDirectory(on).samples()
        assert mix.preferences([sample.meta]) == pytest.approx(0.515003, abs=1e-6)


def test_pnapo_takes_the_rewards_difference_as_log_odds(resolve: Resolve, model: Path, tmp_path: Path) -> None:
    """Its factor 2 sigmoid(dr) - 1 is 2p - 1: p of 0.31 and 0.28 is sigmoid(0.03) = 0.507499."""
    on = make_shards(tmp_path / "hps", model, num_pairs=1, rewards=("hpsv2",), scores=[(0.31, 0.28)])
    mix = resolve("pnapo-sd3", on).mix
    assert mix
    assert mix.preferences([sample.meta for sample in ShardDirectory(on).samples()]) == pytest.approx(0.507499)


def test_a_presets_range_is_for_its_own_reward(resolve: Resolve, shards: Path) -> None:
    mix = resolve("smpo-sd15", shards).mix
    assert mix
    assert mix.identity()["reward_range"] == {}
    assert mix.preference.scales == {"taste": 1}
    own = resolve("smpo-sd15", shards, reward_range=["taste=0:2"]).mix
    assert own
    assert own.preference.scales == {"taste": 2}


def test_an_unknown_preset_is_one_line(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "run", preset="smpo")) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "--preset smpo is not known; known: " in error
    assert all(name in error for name in PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_keys_are_flags(name: str) -> None:
    flags = {flag for flag, *_ in fields_of(TrainSettings)}
    assert PRESETS[name].flags.keys() <= flags


def test_a_preset_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(monkeypatch, ["--show-preset", "smpo-sdxl"]) == 0
    said = capsys.readouterr().out
    assert "sdxl" in said
    assert "from: SmPO-Diffusion's scripts (arXiv 2506.02698)" in said
    for part in ("--objective smpo", "--beta 5000", "--lr 1e-08 --scale-lr", "--reward-range pickscore=0.1", "--dtype"):
        assert part in said
    for part in ("--source renoise", "--steps 10", "--renoise-steps 1", "--prompt-dropout 0.2"):
        assert part in said
    assert run_cli(monkeypatch, ["--show-preset", "capo-sdxl"]) == 0
    assert "--forward-noise image" in capsys.readouterr().out
    assert run_cli(monkeypatch, ["--show-preset", "smpo"]) == 2
    assert "--preset smpo is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_the_printed_flags_of_a_preset_have_its_effect(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in PRESETS:
        assert run_cli(monkeypatch, ["--show-preset", name]) == 0
        (line,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("smpo-train: "))
        given = ["--shards", str(shards), "--model", str(model), "--out", str(tmp_path)]
        shown = resolve_settings(monkeypatch, [*given, *line.split()[1:]])
        preset = resolve_settings(monkeypatch, [*given, "--preset", name])
        assert shown.replace(preset=name).model_dump() == preset.model_dump()


@pytest.mark.slow
def test_a_preset_is_overridden_by_flags_and_config_files(train: Train, tmp_path: Path) -> None:
    small = {"lr": None, "warmup_steps": None, "batch_size": None, "max_steps": 1, "grad_accum": 2}
    out = train("flags", preset="smpo-sdxl", dtype="fp32", beta=100, **small)
    settings = json.loads((out / "training.json").read_text())["settings"]
    assert (settings["optimizer"], settings["beta"], settings["warmup_steps"]) == ("adafactor", 100, 100)
    assert settings["lr"] == pytest.approx(2e-8)
    config = tmp_path / "config.yaml"
    config.write_text("beta: 300\ndtype: fp32\n")
    for order in (
        ["--config", str(config), "--preset", "smpo-sd15"],
        ["--preset", "smpo-sd15", "--config", str(config)],
    ):
        name = f"config-{order[0]}"
        out = train(name, **small, **dict(zip((order[0][2:], order[2][2:]), (order[1], order[3]), strict=True)))
        settings = json.loads((out / "training.json").read_text())["settings"]
        assert (settings["optimizer"], settings["beta"], settings["gamma"]) == ("adamw", 300, 10)
