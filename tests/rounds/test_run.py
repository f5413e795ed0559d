"""Which stages run, what is recorded, and where rounds end."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest

from smpo_common.errors import UserError
from smpo_pipeline.rounds import children
from smpo_pipeline.rounds import run as run_module
from smpo_pipeline.rounds.children import run_child
from smpo_pipeline.rounds.run import Rounds
from tests.command import run_here
from tests.rounds.helpers import FakeRunner, evaluated, plan_of, write_config

ROUND = ["generate", "score", "select", "invert", "smpo-train", "evaluate"]
BOTH = [f"00{number} {stage}" for number in (0, 1) for stage in ROUND]
WORSE = {"base": range(8), "round-000": range(1, 9), "round-001": range(8)}
"""Round 0 beats the base in all eight prompts, round 1 loses to it in all, and ties with the base."""


@pytest.fixture
def go(tmp_path):
    """Run two rounds with a runner; returns what was said."""

    def go(runner, *flags, **changed):
        said = []
        settings = {"rounds": 2, "evaluate": evaluated(tmp_path)} | changed
        Rounds(plan_of(tmp_path, *flags, **settings), runner, said.append).go_on()
        return said

    return go


def record(tmp_path):
    return json.loads((tmp_path / "out/rounds.json").read_text())


def test_all_stages_run_once_and_are_recorded(tmp_path, go):
    runner = FakeRunner()
    said = go(runner)
    assert runner.ran == BOTH
    assert re.match(r"round 1 \(2 of 2\), train \(5 of 6\): smpo-train --config ", said[10])
    rounds = record(tmp_path)["rounds"]
    assert [stage["stage"] for stage in rounds[1]["stages"]] == [
        "generate", "score", "select", "invert", "train", "evaluate",
    ]  # fmt: skip
    generated = rounds[1]["stages"][0]
    assert set(generated["inputs"]) == {
        str(tmp_path / "prompts.txt"),
        str(tmp_path / "out/round-000/run/training.json"),
    }
    assert generated["command"].startswith("smpo-pipeline generate --model ")
    again = FakeRunner()
    assert go(again) == again.ran == []


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(BOTH)))
def test_killed_in_any_stage_it_goes_on_there(tmp_path, go, place):
    class Killed(BaseException):
        pass

    def kill(stage):
        if stage == BOTH[place]:
            raise Killed

    runner = FakeRunner()
    runner.before = kill
    with pytest.raises(Killed):
        go(runner)
    assert runner.ran == BOTH[: place + 1]
    done = [stage["stage"] for each in record(tmp_path)["rounds"] for stage in each["stages"]]
    assert len(done) == place
    rest = FakeRunner()
    go(rest)
    assert rest.ran == BOTH[place:]


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"generate": {"steps": 3}}, "generate.steps: None there, 3 here"),
        ({"train": {"max_steps": 4}}, "train.max_steps: 3 there, 4 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"start": "base"}, "start: previous there, base here"),
    ],
)
def test_a_changed_config_is_refused_by_its_key(go, changed, key):
    go(FakeRunner())
    runner = FakeRunner()
    with pytest.raises(UserError, match=re.escape(key)):
        go(runner, **changed)
    assert not runner.ran
    go(runner, "--overwrite", **changed)
    assert runner.ran == BOTH


def test_changed_prompts_and_another_base_are_refused(tmp_path, go):
    go(FakeRunner())
    (tmp_path / "prompts.txt").write_text("a dog\n")
    with pytest.raises(UserError, match="prompts"):
        go(FakeRunner())
    (tmp_path / "prompts.txt").write_text("a cat of prompts.txt\n")
    (tmp_path / "model/model_index.json").write_text("{}")
    with pytest.raises(UserError, match="base"):
        go(FakeRunner())


def test_more_rounds_go_on_and_a_beta_of_a_later_round_may_be_added(go):
    go(FakeRunner(), rounds=1, train={"beta": [10]})
    with pytest.raises(UserError, match=re.escape("train.beta: 10 there, 11 here")):
        go(FakeRunner(), train={"beta": [11, 20]})
    runner = FakeRunner()
    go(runner, train={"beta": [10, 20]})
    assert runner.ran == BOTH[6:]


def test_a_stage_whose_output_or_input_is_gone_or_changed_runs_again(tmp_path, go):
    go(FakeRunner())
    (tmp_path / "out/round-001/scores/scores.json").write_text("changed")
    (tmp_path / "out/round-001/run/training.json").unlink()
    runner = FakeRunner()
    go(runner)
    # The fake stages write the same files again, so that what follows stays as it is.
    assert runner.ran == ["001 score", "001 smpo-train"]


def test_a_failed_stage_names_its_command_and_an_interrupted_one_ends_with_its_status(tmp_path, go):
    runner = FakeRunner()
    runner.before = lambda stage: 2 if stage == "001 invert" else None
    with pytest.raises(UserError, match=r"round-001: invert ended with status 2; .*: smpo-pipeline invert --pairs "):
        go(runner)
    runner.before = lambda _stage: 143
    with pytest.raises(SystemExit) as ended:
        go(runner)
    assert ended.value.code == 143
    runner = FakeRunner()
    go(runner)
    assert runner.ran[0] == "001 invert"


def test_rounds_end_after_a_model_that_loses_to_the_one_before(tmp_path, go):
    runner = FakeRunner(WORSE)
    said = go(runner, rounds=3, stop_if_worse="toy-truth")
    assert runner.ran == BOTH
    assert said[-1].startswith("stopped after round 1: ")
    assert record(tmp_path)["stopped"] == said[-1]
    # Without the flag they go on.
    go(runner, rounds=3)
    assert runner.ran[len(BOTH) :] == [f"002 {stage}" for stage in ROUND]
    assert record(tmp_path)["stopped"] is None


def test_a_reward_to_stop_by_that_was_not_evaluated_is_refused(go):
    with pytest.raises(UserError, match="--stop-if-worse style: round-000 was evaluated by toy-truth only"):
        go(FakeRunner(), stop_if_worse="style")


def test_the_report_compares_with_the_base_and_the_round_before(tmp_path, go):
    go(FakeRunner(WORSE))
    lines = (tmp_path / "out/rounds.md").read_text().splitlines()
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:])
    # Means of 1 .. 8 and of 0 .. 7. Eight prompts all won: 0.025^(1/8) = 63.1 % bounds the win rate.
    assert first[:4] == ["toy-truth", "0", "4.5", "+1 (+1 .. +1)"]
    assert first[4] == first[5] == "100.0 % (63.1 .. 100.0 %)"
    assert second[:3] == ["toy-truth", "1", "3.5"]
    assert second[4:6] == ["50.0 % (50.0 .. 50.0 %)", "0.0 % (0.0 .. 36.9 %)"]
    assert second[6] == "[report](round-001/evaluation/report.html)"


def test_a_kill_between_record_and_report_leaves_a_report_to_the_next_run(tmp_path, go, monkeypatch):
    monkeypatch.setattr(run_module, "write_report", lambda _plan, number: 1 / (1 - number))
    with pytest.raises(ZeroDivisionError):
        go(FakeRunner())
    monkeypatch.undo()
    runner = FakeRunner()
    go(runner)
    assert not runner.ran
    assert "(round-001/evaluation/report.html)" in (tmp_path / "out/rounds.md").read_text()


@pytest.mark.parametrize("lora_rank", [None, 8])
def test_a_lora_of_which_the_model_is_merged_is_not_offered_to_push(tmp_path, capfd, monkeypatch, lora_rank):
    monkeypatch.setattr(children, "run_child", FakeRunner())
    monkeypatch.setattr(children, "resolve_training", lambda _: {"lora_rank": lora_rank})
    path = write_config(tmp_path, evaluate=evaluated(tmp_path))
    done = run_here(capfd, "smpo-pipeline", "rounds", "--config", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert ("smpo-pipeline push" in done.stdout) == (lora_rank is None)


def test_an_evaluation_takes_over_the_images_of_the_one_before(tmp_path, go):
    def draw(stage):
        if stage.endswith("evaluate"):
            number = stage.split()[0]
            images = tmp_path / f"out/round-{number}/evaluation/images"
            seen[number] = sorted(path.name for path in images.glob("*/*"))
            (images / f"round-{number}").mkdir(parents=True)
            (images / f"round-{number}" / f"{number}.png").touch()

    seen = {}
    runner = FakeRunner()
    runner.before = draw
    go(runner)
    assert seen == {"000": [], "001": ["000.png"]}


def test_what_is_told_to_end_ends_its_child(tmp_path):
    """SIGTERM raises SystemExit in the main thread (smpo_common.commandline)."""

    def end(*_signal):
        raise SystemExit(143)

    before = signal.signal(signal.SIGALRM, end)
    began = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(SystemExit):
            run_child(["sh", "-c", f"trap 'touch {tmp_path}/ended; exit' TERM; while :; do sleep 0.1; done"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "ended").exists()
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -9 $$", -9)])
def test_the_status_of_a_child(script, status):
    assert run_child(["sh", "-c", script]) == status
