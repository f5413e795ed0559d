"""Mistakes that stages 1 and 2 find before they start Ray."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests.calibration.helpers import write_scores
from tests.command import assert_one_line, run_here
from tests.jobs.helpers import invert, score


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return write_scores(tmp_path_factory.mktemp("scores") / "out", {"pickscore": np.ones((1, 2))}, [1.0], ["a cat"])


def test_wrong_use_is_one_line(inputs, scores, tmp_path, capfd):
    run = partial(run_here, capfd)
    out = tmp_path / "out"
    assert_one_line(score(inputs, out, "--pairs", tmp_path / "no", run=run), "--pairs", "does not exist")
    assert_one_line(score(inputs, out, "--reward", "nothing", run=run), "--reward nothing")
    assert_one_line(score(inputs, out, "--prompt-column", "text", run=run), "no column 'text'")
    assert_one_line(score(inputs, out, "--reward", f"pickscore={inputs / 'model'}", run=run), "twice")
    assert_one_line(invert(inputs, tmp_path, out, run=run), "no scores.json")
    assert_one_line(invert(inputs, scores, out, "--model", inputs, run=run), "--model", "cannot be loaded")
    assert_one_line(invert(inputs, scores, out, "--resolution", 33, run=run), "--resolution 33", "multiple of 8")
    assert_one_line(invert(inputs, scores, out, "--start", "sideways", run=run), "--start sideways")
    assert_one_line(invert(inputs, scores, out, "--steps", 1000, run=run), "--steps 1000", "1000 timesteps")
    (tmp_path / "file").write_text("")
    assert_one_line(invert(inputs, scores, tmp_path / "file" / "out", run=run), "--out", "cannot write")
    assert not out.exists()


def test_flags_that_a_solver_does_not_use_are_one_line(inputs, scores, tmp_path, capfd):
    run = partial(run_here, capfd)
    out = tmp_path / "out"
    assert_one_line(invert(inputs, scores, out, "--tolerance", 1e-3, run=run), "--tolerance", "--solver renoise")
    done = invert(inputs, scores, out, "--solver", "anderson", "--renoise-steps", 3, run=run)
    assert_one_line(done, "--renoise-steps: --solver anderson", "--solver renoise")
    done = invert(inputs, scores, out, "--source", "forward", "--solver", "ddim", run=run)
    assert_one_line(done, "--solver: --source forward")
    for flag, value in (("--eta", 0.1), ("--guidance-scale", 3), ("--start", "level0"), ("--inverting-unet", tmp_path)):
        done = invert(inputs, scores, out, "--source", "forward", flag, value, run=run)
        assert_one_line(done, f"{flag}: --source forward", "--source renoise")
    assert_one_line(
        invert(inputs, scores, out, "--forward-noise", "image", run=run), "--forward-noise: --source renoise"
    )
    assert_one_line(invert(inputs, scores, out, "--renoise-average", "3", run=run), "--renoise-average 3: ", "lastN")
    assert_one_line(invert(inputs, scores, out, "--inverting-unet", tmp_path, run=run), str(tmp_path), "no denoiser")
    assert not out.exists()
