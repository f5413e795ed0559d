"""Wrong flags and inputs end with one line and status 2; config files repeat a run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from smpo_common.files import sha256_file
from smpo_schemas.scoring.scores import ScoresInfo, ScoresPart, write_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.run import run_training
from smpo_trainer.settings import TrainSettings
from tests.command import run_command
from tests.tiny.stable_diffusion import make_tiny_model
from tests.trainer.conftest import Train
from tests.trainer.helpers import PROMPTS, arguments, make_shards, resolve_settings, run_cli

Refused = Callable[..., str]


@pytest.fixture
def refused(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Run ``smpo-train``, which must fail with status 2 and one line; returns the line."""

    def run(
        *, on: Path | list[Path] = shards, base: Path = model, out: Path = tmp_path / "run", **options: object
    ) -> str:
        capsys.readouterr()
        assert run_cli(monkeypatch, arguments(on, base, out, **options)) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert error.startswith("error: ")
        return error

    return run


def test_no_manifest(refused: Refused, tmp_path: Path) -> None:
    assert "no manifest.json" in refused(on=tmp_path)


def test_missing_model(refused: Refused, tmp_path: Path) -> None:
    assert f"--model {tmp_path / 'none'}" in refused(base=tmp_path / "none")


def test_model_that_is_not_the_reference(refused: Refused, tmp_path: Path, model: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7)
    error = refused(base=other)
    assert f"--model {other}" in error
    assert "text encoder" in error
    # The same text encoder, another denoiser.
    for file in (model / "text_encoder").iterdir():
        (other / "text_encoder" / file.name).write_bytes(file.read_bytes())
    error = refused(base=other)
    assert "its denoiser is not the reference" in error
    assert "--unet" in error


def test_other_prediction_type(refused: Refused, v_model: Path) -> None:
    error = refused(base=v_model)
    assert f"--model {v_model}" in error
    assert "prediction type" in error


def test_unet_that_is_the_reference_needs_no_remark(
    train: Train, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(unet=model / "unet", max_steps=1)
    assert "--unet" not in capsys.readouterr().out


@pytest.mark.slow
def test_rewards(refused: Refused, tmp_path: Path, model: Path, train: Train) -> None:
    error = refused(reward=["nothing"])
    assert "--reward nothing: not in --shards" in error
    assert "taste" in error
    assert "--scores" in error  # it may have been scored after the shards were made
    assert "taste:2" in refused(reward=["taste=2"])
    assert "--reward taste sharpness" in refused(reward=["taste,sharpness"])
    several = make_shards(tmp_path / "several", model, num_pairs=2, rewards=("taste", "sharpness"))
    error = refused(on=several)
    assert "taste, sharpness" in error
    assert "--reward NAME" in error
    assert "--reward taste:much: expected NAME or NAME:WEIGHT" in refused(reward=["taste:much"])
    assert "--reward taste is given twice" in refused(reward=["taste:1", "taste:2"])
    out = train("mix", on=several, reward=["taste:2", "sharpness:-0.5"], max_steps=1)
    weights = {k: v["weight"] for k, v in json.loads((out / "training.json").read_text())["rewards"].items()}
    assert weights == {"taste": 2.0, "sharpness": -0.5}
    train("labels", on=several, objective="dpo", max_steps=1)


def test_an_unavailable_optimizer_is_refused_before_a_model_is_loaded(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smpo_trainer.run.load_policy", None)
    assert "--optimizer adamw8bit needs a GPU" in refused(optimizer="adamw8bit")
    monkeypatch.setattr("smpo_trainer.model.optimizers._EIGHT_BIT", ("cpu",))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert "bitsandbytes" in refused(optimizer="adamw8bit")


def test_defaults_are_printed(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(max_steps=1, lr=None, objective="dpo")
    said = capsys.readouterr().out
    for part in ("32 x 32", "20 % without prompt", "50 % mirrored", "dpo", "beta 2000", "rate 1e-05"):
        assert part in said


def test_unknown_objective(refused: Refused) -> None:
    assert (
        "--objective nonsense is not known; known: capo, dmpo, dpo, ipo, linear-dpo, mapo, npo, selfnpo, sft, smpo"
        in refused(objective="nonsense")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigmoid_bias", "nan"),
        *((name, "inf") for name in ("beta", "lr", "max_grad_norm", "budget", "budget_weight", "snr_gamma", "x0_cap")),
    ],
)
def test_numbers_are_finite(refused: Refused, name: str, value: str) -> None:
    error = refused(**{name: value})
    assert f"--{name.replace('_', '-')} {value}: " in error
    assert "finite number" in error


@pytest.mark.parametrize(("flag", "value"), [("--seed", "4294967296"), ("--cache-gib", "1e300")])
def test_huge_numbers_are_refused(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
) -> None:
    assert run_cli(monkeypatch, [*arguments(shards, model, tmp_path / "run"), flag, value]) == 2
    assert flag in capsys.readouterr().err


def test_the_largest_seed(train: Train) -> None:
    train(seed=2**32 - 1, max_steps=1)


def test_unwritable_output(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "error: --out: cannot write" in refused(out=tmp_path / "file" / "run")


def test_no_pairs_left(refused: Refused, tmp_path: Path, model: Path) -> None:
    unlabelled = make_shards(tmp_path / "unlabelled", model, num_pairs=2, labels=(None, 0.5))
    error = refused(on=unlabelled, objective="dpo")
    assert "--objective dpo" in error
    assert "0 of 2 trajectories" in error
    assert "--min-timestep 999 --max-timestep 999" in refused(min_timestep=999, max_timestep=999)


def test_timesteps_are_filtered(train: Train, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timesteps = [t for sample in ShardDirectory(shards).samples() for t in sample.timestep_K.tolist()]
    low, high = sorted(timesteps)[4], sorted(timesteps)[11]
    train(min_timestep=low, max_timestep=high, max_steps=1)
    assert "8 of 18 states of 6 trajectories" in capsys.readouterr().out


def test_damaged_shard(refused: Refused, tmp_path: Path, model: Path) -> None:
    damaged = make_shards(tmp_path / "damaged", model, num_pairs=2)
    tar = damaged / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(bytes(content))
    assert "shard-000000.tar differs from the SHA-256" in refused(on=damaged)


def test_shards_that_do_not_fit_each_other(refused: Refused, tmp_path: Path, shards: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7)
    foreign = make_shards(tmp_path / "foreign", other, num_pairs=1)
    error = refused(on=[shards, foreign])
    assert f"--shards {shards} and {foreign}" in error
    assert "reference denoiser" in error
    assert f"--shards names {shards} twice" in refused(on=[shards, shards])
    encoded = shutil.copytree(shards, tmp_path / "encoded")
    manifest = json.loads((encoded / "manifest.json").read_text())
    manifest["inversion"]["empty_prompt"] = "encoded"
    (encoded / "manifest.json").write_text(json.dumps(manifest))
    error = refused(on=[shards, encoded])
    assert f"--shards {shards} and {encoded}" in error
    assert "--empty-prompt" in error


def test_several_directories_are_joined(
    train: Train, tmp_path: Path, model: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = make_shards(tmp_path / "more", model, num_pairs=2, seed=3, prefix="more")
    train(on=[shards, more], max_steps=1)
    assert "24 of 24 states of 8 trajectories" in capsys.readouterr().out


def test_scores_from_a_table(train: Train, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores of four of the six pairs, another reward than the shards hold."""
    folder = tmp_path / "scores"
    folder.mkdir()
    ids = [f"pair-{number}" for number in range(4)]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(4)]
    table = pa.table(
        {"pair_id": ids, "prompt": prompts, "style_0": [1.0, 0.0, 0.5, 1.0], "style_1": [0.0, 1.0, 0.5, 0.0]}
    )
    pq.write_table(table, folder / "part-0.parquet")
    statistics = ShardDirectory(shards).manifest.rewards["taste"]
    part = ScoresPart(name="part-0.parquet", pairs=4, sha256=sha256_file(folder / "part-0.parquet"))
    info = ScoresInfo(schema_version=1, rewards={"style": statistics}, parts=[part], scored=4, rejected=2)
    write_scores_info(folder, info)
    train(scores=folder, max_steps=1)
    said = capsys.readouterr().out
    assert "2 of 6 trajectories without scores" in said
    assert "12 of 18 states" in said


@pytest.mark.slow
def test_config_file_repeats_a_run_and_flags_override_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = train(max_steps=2, beta=300)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["beta"] == 300
    args = ["--config", str(out / "config.yaml"), "--out", str(tmp_path / "again"), "--beta", "400"]
    assert run_cli(monkeypatch, args) == 0
    again = json.loads((tmp_path / "again" / "training.json").read_text())["settings"]
    assert (again["beta"], again["max_steps"]) == (400, 2)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_DEEPSPEED"])
def test_deepspeed_and_megatron_are_refused(refused: Refused, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "true")
    error = refused()
    assert "DeepSpeed or Megatron" in error
    assert "--use_fsdp --fsdp_version 2" in error


@pytest.mark.parametrize(
    ("environment", "options", "error"),
    [
        ({"FSDP_VERSION": "1"}, {}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "--use_parallelism_config"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "--fsdp_offload_params"),
        ({"FSDP_IGNORED_MODULES": "mid_block"}, {}, "--fsdp_ignored_modules"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "--fsdp_activation_checkpointing (use --gradient-check"),
        ({}, {"optimizer": "adafactor", "dtype": "fp16"}, "--optimizer adafactor (use adamw), --dtype"),
        ({}, {"compile": True}, "--compile"),
        ({"FSDP_AUTO_WRAP_POLICY": "by_size"}, {}, "Invalid auto wrap policy"),
        ({}, {}, "FSDP needs several processes"),
    ],
)
def test_fsdp_that_is_not_supported_is_refused(
    refused: Refused,
    environment: dict[str, str],
    options: dict[str, object],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which accelerate sets
    message = refused(**options)
    assert "FSDP" in message
    assert error in message


def test_an_old_flag_and_an_old_key_name_the_new_one(refused: Refused, tmp_path: Path) -> None:
    for old, new in (("mixed_precision", "dtype"), ("validation_every", "image_every")):
        error = refused(**{old: "8"})
        assert f"--{old.replace('_', '-')}" in error
        assert f"did you mean --{new.replace('_', '-')}?" in error
        config = tmp_path / "config.yaml"
        config.write_text(f"{old}: 8\n")
        assert f"unknown key '{old}'; did you mean '{new}'?" in refused(config=config)


def test_settings_made_in_python_have_the_same_defaults(shards: Path, model: Path, tmp_path: Path) -> None:
    defaults = TrainSettings(shards=(str(shards),), model=str(model), out=tmp_path / "run")
    run_training(defaults.replace(max_steps=1, workers=0))
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["max_steps"], config["objective"], config["dtype"]) == (1, "smpo", "fp32")
    assert (tmp_path / "run" / "training.json").is_file()


def test_a_config_holds_the_values_of_the_flags(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "reward": ["taste:0.3", "style"], "reward_range": ["taste=-1:2.5"], "objective": "dpo",
        "objective_option": ["label_smoothing=0.1"], "scale_lr": True, "val_fraction": 0.25,
    }  # fmt: skip
    settings = resolve_settings(monkeypatch, arguments(shards, model, tmp_path / "run", **flags))
    settings.write(tmp_path)
    again = resolve_settings(monkeypatch, ["--config", str(tmp_path / "config.yaml")])
    assert again.model_dump() == settings.model_dump()


@pytest.mark.slow
def test_the_shell_completes_flags_and_choices() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_SMPO_TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return run_command("smpo-train", **asked).stdout.split()

    assert completed("smpo-train --objective-o") == ["--objective-option"]
    assert completed("smpo-train --dtype b") == ["bf16"]


def test_the_last_line_names_the_next_command(train: Train, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = train(max_steps=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"smpo-pipeline evaluate --model base={model} tuned={out} --prompts FILE --reward taste --out " in last


def test_fp16_needs_a_gpu(refused: Refused) -> None:
    assert "--dtype fp16" in refused(dtype="fp16")
