"""``select --judge vlm`` asks a vision model in both orders; the model here prefers bright images, and a position."""

from __future__ import annotations

import threading

import pyarrow.parquet as pq
import pytest
import tenacity

from smpo_common import retry
from smpo_schemas.generation.selection import read_selection
from smpo_schemas.rejects import read_rejects
from tests.command import assert_one_line, run_here
from tests.pictures import encode
from tests.selection.helpers import make_candidates
from tests.servers.json_server import JsonServer
from tests.servers.vision_server import compare, completion, content, grey, vision_server

LEVELS = {"a cat": (40, 120, 80, 10), "a dog": (90, 20, 60), "a cow": (30, 70, 100), "a bat": (5, 15, 25)}


@pytest.fixture
def select(capfd, tmp_path, monkeypatch):
    """Select from grey candidates by the judge of a server; return the command's result."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(retry.TRANSIENT_RETRY, "wait", tenacity.wait_none())
    prompts = {prompt: [(float(level % 3),) for level in levels] for prompt, levels in LEVELS.items()}
    made = make_candidates(
        tmp_path / "in", prompts, ("a",), image=lambda prompt, index: encode(grey(LEVELS[prompt][index]), "PNG")
    )

    def run(server: JsonServer | None, *flags, options: str = ""):
        inputs = ("--candidates", made[0], "--scores", made[1], "--by", "ranking", "--out", tmp_path / "out")
        judge = f"vlm={server.url},cache={tmp_path}/kept{options}" if server else "vlm"
        return run_here(capfd, "smpo-pipeline", "select", *inputs, "--judge", judge, *flags)

    return run


def chosen_and_rejected(out) -> dict[str, tuple[int, int, float]]:
    """Levels of both images, and the gap."""
    found = {}
    for row in pq.read_table(out / "pairs.parquet").to_pylist():
        levels = [LEVELS[row["prompt"]][row[f"noise_{side}"]["index"]] for side in (0, 1)]
        found[row["prompt"]] = (levels[row["chosen_image"]], levels[1 - row["chosen_image"]], row["gap"])
    return found


@pytest.mark.parametrize("bias", [0.0, 0.25])
def test_a_bias_towards_a_position_is_measured_and_changes_no_pair(select, tmp_path, bias):
    with vision_server(compare(bias)) as server:
        done = select(server)
        assert done.returncode == 0, done.stderr
        asked = len(server.bodies)
        found = chosen_and_rejected(tmp_path / "out")
        for prompt, levels in LEVELS.items():
            best, worst = max(levels), min(levels)
            assert found[prompt] == (best, worst, pytest.approx((best - worst) / 255, abs=2e-3))
        info = read_selection(tmp_path / "out")
        assert asked == 2 * info.comparisons > 0
        assert info.shown_first == pytest.approx(0.5 + bias, abs=1e-3)
        assert f"the image shown first got {0.5 + bias:.3f} of the preference" in done.stdout
        assert info.settings.judge == f"vlm={server.url},axis=mean"
        # All answers are there.
        assert select(server, "--overwrite", options=",budget=0").returncode == 0
        assert len(server.bodies) == asked
        assert read_selection(tmp_path / "out") == info


def test_prompts_are_compared_at_once(select, tmp_path):
    """The first two questions wait for each other."""
    two, first = threading.Barrier(2, timeout=30), threading.Semaphore(2)

    def together(body):
        if first.acquire(blocking=False):
            two.wait()
        return compare()(body)

    with vision_server(together) as server:
        done = select(server, options=",concurrency=2,axis=style")
    assert done.returncode == 0, done.stderr
    assert server.most_at_once == 2
    assert {prompt: pair[:2] for prompt, pair in chosen_and_rejected(tmp_path / "out").items()} == {
        prompt: (max(levels), min(levels)) for prompt, levels in LEVELS.items()
    }


def test_a_prompt_with_an_unreadable_answer_is_rejected(select, tmp_path):
    def partly(body):
        return completion("Image 1 is better.") if "[a dog]" in content(body)[0] else compare()(body)

    with vision_server(partly) as server:
        done = select(server)
    assert done.returncode == 0, done.stderr
    (reject,) = read_rejects(tmp_path / "out" / "rejected.parquet")
    assert reject.reason.startswith("judge failed: no two alignment scores that sum to 1 in 'Image 1 is better.'")
    assert chosen_and_rejected(tmp_path / "out").keys() == LEVELS.keys() - {"a dog"}


def test_mistakes_are_one_line(select, tmp_path):
    assert_one_line(select(None), "--judge vlm: give the server's address")
    with vision_server(compare()) as server:
        assert_one_line(select(server, options=",budget=3"), "the budget of 3 requests is used up")
        assert len(server.bodies) == 3
        assert_one_line(select(server, options=",colour=red"), "there is no option 'colour'")
    assert_one_line(select(server), "--judge vlm: no server answers")
    assert_one_line(select(None, "--judge", "rewards=x"), "--judge rewards=x: this judge takes no model")
