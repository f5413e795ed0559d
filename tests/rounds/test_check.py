"""Configs that are refused before anything runs."""

from __future__ import annotations

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.rounds.check import check_stages
from smpo_pipeline.rounds.stages import Training
from tests.command import assert_one_line, run_here
from tests.rounds.helpers import config, evaluated, options_of, write_config


def resolve(_arguments):
    return {"lora_rank": None, "preference": "minmax"}


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"generate": {"imags_per_prompt": 4}}, ("generate:", "'imags_per_prompt'", "mean 'images_per_prompt'?")),
        ({"generate": {"images_per_prompt": 3}}, ("generate:", "--images-per-prompt 3")),
        ({"generate": {"seed": 1}}, ("generate: seed:", "leave it out")),
        ({"generate": {"out": "x"}}, ("generate: out:", "leave it out")),
        ({"score": {"reward": "pickscor"}}, ("score:", "pickscore?")),
        ({"refresh": {"reward": "toy-truth", "pairs": "x"}}, ("refresh:", "--scores")),
        ({"refresh": {"candidates": "x"}}, ("refresh: candidates:", "leave it out")),
        ({"weigh": {"golden_column": "g", "golden": "x"}}, ("weigh:", "--golden")),
        ({"weigh": {"scores": "x"}}, ("weigh: scores:", "leave it out")),
        ({"select": {}}, ("select:", "--by")),
        ({"select": {"by": "extremes", "min_gap": 2}}, ("select:", "--min-gap")),
        ({"invert": {"steps": "many"}}, ("invert:", "--steps", "valid integer")),
        ({"invert": {"tolerance": 0.1}}, ("invert:", "--tolerance", "--solver renoise does not use it")),
        ({"invert": {"inverting_unet": "x"}}, ("invert: inverting_unet:", "leave it out")),
        ({"evaluate": {"reward": "toy-truth"}}, ("evaluate:", "--prompts")),
        ({"train": {"weight_column": "w"}}, ("train: weight_column:", "leave it out")),
    ],
)
def test_a_stages_flags(tmp_path, changed, parts):
    with pytest.raises(UserError) as refused:
        check_stages(options_of(tmp_path, **changed), resolve)
    for part in parts:
        assert part in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"round": 2}, ("unknown key 'round'", "mean 'rounds'?")),
        ({"generate": ["steps"]}, ("mapping", "['steps']")),
        ({"inverting": "policy"}, ("--inverting policy", "did harm", "--force")),
        ({"refresh": {}, "start": "base"}, ("--start base with --reference previous",)),
        ({"reference": "previous", "start": "base"}, ("--start base with --reference previous",)),
        ({"rounds": 2, "invert": {"source": "tracked"}}, ("--source tracked", "--reference previous")),
        ({"rounds": 3, "train": {"beta": [1, 2]}}, ("train: beta: 2 values for 3 rounds",)),
        ({"stop_if_worse": "toy-truth"}, ("--stop-if-worse toy-truth", "evaluate")),
    ],
)
def test_the_rounds_own_flags(tmp_path, capfd, changed, parts):
    done = run_here(
        capfd, "smpo-pipeline", "rounds", "--config", write_config(tmp_path, **changed), "--out", tmp_path / "out"
    )
    assert_one_line(done, *parts)


def test_too_few_prompts_and_a_reward_that_is_not_evaluated(tmp_path):
    prompts = [config(tmp_path)["prompts"]] * 2
    with pytest.raises(UserError, match="prompts: 2 values for 3 rounds"):
        options_of(tmp_path, rounds=3, prompts=prompts)
    options = options_of(tmp_path, stop_if_worse="pickscore", evaluate=evaluated(tmp_path))
    with pytest.raises(UserError, match="--stop-if-worse pickscore: evaluate: reward has only toy-truth"):
        check_stages(options, resolve)


def test_what_only_a_later_round_refuses_is_refused_before_the_first(tmp_path):
    policy = {"inverting": "policy", "force": True}
    with pytest.raises(UserError, match="invert: --inverting-unet: --source forward does not use it"):
        check_stages(options_of(tmp_path, rounds=2, invert={"source": "forward"}, **policy), resolve)
    sampled = {"generate": {"keep": "states:4", "sampler": "ddim"}, "invert": {"source": "sampled"}}
    for fitting in (policy, {"reference": "previous"}, {"rounds": 1}):
        check_stages(options_of(tmp_path, **{"rounds": 2, **sampled, **fitting}), resolve)


@pytest.mark.parametrize(
    ("spec", "name", "other"),
    [
        ("judge=http://localhost:9/v1,axis=style,name=style", "style", "judge"),
        ("http=http://localhost:9", "http", "mine"),
        ("tests.evaluation.stubs:Brightness", "brightness", "Brightness"),
    ],
)
def test_the_reward_to_stop_by_is_named_as_its_column(tmp_path, spec, name, other):
    evaluate = {**evaluated(tmp_path), "reward": [spec, "toy-truth"]}
    check_stages(options_of(tmp_path, stop_if_worse=name, evaluate=evaluate), resolve)
    with pytest.raises(UserError, match=f"--stop-if-worse {other}: evaluate: reward has only {name}, toy-truth"):
        check_stages(options_of(tmp_path, stop_if_worse=other, evaluate=evaluate), resolve)


def test_a_refreshed_reward_may_be_the_only_one(tmp_path):
    human = {"scores": str(tmp_path), "pairs": str(tmp_path)}
    options = options_of(tmp_path, score={}, refresh={"reward": "toy-truth", **human})
    assert check_stages(options, resolve) == Training()


def test_each_beta_is_checked_and_what_training_resolves_is_known(tmp_path):
    asked = []

    def resolve(arguments):
        assert arguments[0] == "--shards"
        asked.append(arguments[arguments.index("--beta") + 1])
        return {"lora_rank": 8, "preference": "winrate", "variant": "fp16"}

    options = options_of(tmp_path, rounds=2, train={"beta": [10, 20]}, launcher="torchrun --nproc-per-node 8")
    assert check_stages(options, resolve) == Training(lora=True, needs_scores=True, variant="fp16")
    assert asked == ["10", "20"]


@pytest.mark.parametrize(
    ("train", "parts"),
    [
        ({"lrr": 1}, ("train: unknown key 'lrr'", "mean 'lr'?")),
        ({"max_steps": "many"}, ("train:", "--max-steps", "valid integer")),
    ],
)
def test_smpo_train_checks_its_own(tmp_path, capfd, train, parts):
    path = write_config(tmp_path, train=train)
    assert_one_line(run_here(capfd, "smpo-pipeline", "rounds", "--config", path, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_a_presets_lora_is_seen_and_a_dry_run_prints_all_commands(tmp_path, capfd):
    path = write_config(tmp_path, train={"preset": "npo-sd15"}, rounds=2, start="base")
    done = run_here(capfd, "smpo-pipeline", "rounds", "--config", path, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1 if "pipeline" in line.split()[0] else 0] for line in lines] == 2 * [
        "generate", "score", "select", "invert", "smpo-train",
    ]  # fmt: skip
    assert f"--lora {tmp_path}/out/round-000/run" in lines[5]
    assert (tmp_path / "out/flags/train.yaml").read_text() == "preset: npo-sd15\n"
    assert not (tmp_path / "out/rounds.json").exists()
