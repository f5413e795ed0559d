"""The commands of a round."""

from __future__ import annotations

import pytest

from tests.rounds.helpers import ALL, evaluated, flag, plan_of


def commands(plan, number):
    return {stage.name: stage.command for stage in plan.stages(number)}


def test_the_stages_are_in_order_and_each_reads_what_the_one_before_wrote(tmp_path):
    plan = plan_of(tmp_path, evaluate=evaluated(tmp_path), seed=5, generate={"steps": 4})
    assert [stage.name for stage in plan.stages(0)] == [*ALL, "evaluate"]
    folder, model = tmp_path / "out/round-000", str(tmp_path / "model")
    found = commands(plan, 0)
    assert found["generate"] == (
        "smpo-pipeline", "generate", "--config", f"{tmp_path}/out/flags/generate.yaml", "--model", model,
        "--prompts", str(tmp_path / "prompts.txt"), "--seed", "5", "--out", str(folder / "candidates"),
    )  # fmt: skip
    assert flag(found["score"], "--pairs") == flag(found["select"], "--candidates") == [str(folder / "candidates")]
    assert flag(found["select"], "--scores") == [str(folder / "scores")]
    assert flag(found["invert"], "--pairs") == [str(folder / "pairs/pairs.parquet")]
    assert flag(found["invert"], "--scores") == [str(folder / "pairs/scores")]
    assert found["train"] == (
        "smpo-train", "--config", f"{tmp_path}/out/flags/train.yaml", "--shards", str(folder / "shards"),
        "--model", model, "--seed", "5", "--out", str(folder / "run"),
    )  # fmt: skip
    assert flag(found["evaluate"], "--model") == [f"base={model}", f"round-000={folder}/run"]


@pytest.mark.parametrize(
    ("config", "lora", "generate", "invert", "train"),
    [
        ({}, False, "--unet run", None, "--unet run"),
        ({"start": "base"}, False, "--unet run", None, None),
        ({"reference": "previous"}, False, "--unet run", "--unet run", "--unet run"),
        ({"reference": "previous", "inverting": "policy"}, False, "--unet run", "--unet run", "--unet run"),
        ({"inverting": "policy", "force": True}, False, "--unet run", "--inverting-unet run", "--unet run"),
        ({"start": "base"}, True, "--lora run", None, None),
        ({}, True, "--unet run/merged", None, "--unet run/merged"),
        ({"reference": "previous"}, True, "--unet run/merged", "--unet run/merged", "--unet run/merged"),
    ],
)
def test_where_the_model_before_is_used_in_round_1(tmp_path, config, lora, generate, invert, train):
    plan = plan_of(tmp_path, rounds=2, lora=lora, **config)
    for name, wanted in {"generate": generate, "invert": invert, "train": train}.items():
        for each in ("--unet", "--lora", "--inverting-unet"):
            assert flag(commands(plan, 0)[name], each) is None
            kind, _, path = (wanted or "").partition(" ")
            found = [str(tmp_path / "out/round-000" / path)] if each == kind else None
            assert flag(commands(plan, 1)[name], each) == found, (name, each)


def test_a_lora_is_merged_into_the_denoiser_that_it_was_trained_on(tmp_path):
    plan = plan_of(tmp_path, rounds=2, lora=True, evaluate=evaluated(tmp_path))
    assert [stage.name for stage in plan.stages(1)] == [*ALL, "merge", "evaluate"]
    first, second = (commands(plan, number)["merge"] for number in (0, 1))
    assert flag(first, "--unet") is None
    assert flag(second, "--unet") == [str(tmp_path / "out/round-000/run/merged")]
    assert flag(second, "--positive") == [str(tmp_path / "out/round-001/run")]
    assert flag(second, "--out") == [str(tmp_path / "out/round-001/run/merged")]
    assert (flag(commands(plan, 1)["evaluate"], "--model") or [])[1:] == [
        f"round-00{number}={tmp_path}/out/round-00{number}/run/merged" for number in (0, 1)
    ]


def test_a_refreshed_reward_is_scored_beside_the_others_and_each_round_is_held_to_the_one_before(tmp_path):
    plan = plan_of(tmp_path, rounds=2, refresh={"reward": f"pickscore={tmp_path / 'clip'}"})
    folder = tmp_path / "out/round-001"
    assert [stage.name for stage in plan.stages(1)] == [ALL[0], "refresh", *ALL[1:]]
    found = commands(plan, 1)
    assert found["refresh"] == (
        "smpo-pipeline", "refresh", "--config", f"{tmp_path}/out/flags/refresh.yaml",
        "--candidates", str(folder / "candidates"), "--seed", "1", "--out", str(folder / "refreshed"),
    )  # fmt: skip
    assert flag(found["score"], "--reward") == [f"pickscore={tmp_path / 'clip'}", f"refreshed={folder / 'refreshed'}"]
    assert flag(found["invert"], "--unet") == [str(tmp_path / "out/round-000/run")]
    base = plan_of(tmp_path, rounds=2, refresh={}, score={}, reference="base")
    assert flag(commands(base, 1)["score"], "--reward") == [f"refreshed={folder / 'refreshed'}"]
    assert flag(commands(base, 1)["invert"], "--unet") is None


def test_weights_are_made_of_the_selected_pairs_and_trained_by(tmp_path):
    plan = plan_of(tmp_path, weigh={"golden_column": "golden"}, seed=4)
    assert [stage.name for stage in plan.stages(0)] == [*ALL[:3], "weigh", *ALL[3:]]
    found, folder = commands(plan, 0), tmp_path / "out/round-000/pairs"
    assert found["weigh"] == (
        "smpo-pipeline", "weigh", "--config", f"{tmp_path}/out/flags/weigh.yaml", "--scores", str(folder / "scores"),
        "--pairs", str(folder / "pairs.parquet"), "--seed", "4",
    )  # fmt: skip
    assert flag(found["train"], "--scores") == [str(folder / "scores")]
    assert flag(found["train"], "--weight-column") == ["weight"]
    other = plan_of(tmp_path, weigh={"golden_column": "golden", "column": "mine"})
    assert flag(commands(other, 0)["train"], "--weight-column") == ["mine"]


def test_prompts_betas_and_seeds_of_each_round(tmp_path):
    files = [str(tmp_path / name) for name in ("prompts.txt", "other.txt")]
    plan = plan_of(
        tmp_path, rounds=2, prompts=files, seed=7, train={"beta": [300, "auto:20"]}, evaluate=evaluated(tmp_path)
    )
    for number, (file, beta) in enumerate(zip(files, ("300", "auto:20"), strict=True)):
        found = commands(plan, number)
        assert flag(found["generate"], "--prompts") == [file]
        assert flag(found["train"], "--beta") == [beta]
        for name in ("generate", "select", "invert", "train"):
            assert flag(found[name], "--seed") == [str(7 + number)]
        assert flag(found["evaluate"], "--seed") == ["7"]


def test_training_under_a_launcher(tmp_path):
    plan = plan_of(tmp_path, launcher="torchrun --nproc-per-node 8")
    command = commands(plan, 0)["train"]
    assert command[:6] == ("torchrun", "--nproc-per-node", "8", "-m", "smpo_trainer", "--config")
