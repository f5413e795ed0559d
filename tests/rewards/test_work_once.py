"""Images are decoded once, weights loaded once, prompts encoded once; adding a reward does not repeat the others."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_pipeline.rewards import load_reward
from smpo_schemas.scoring.scores import read_scores_info
from tests.command import run_command
from tests.pictures import encode, picture

REWARDS = """
import os

import numpy as np

from smpo_pipeline.rewards import Reward


class First(Reward):
    name, unit = "first", "grey levels"

    def __init__(self, model, device):
        self.model = self.fingerprint = "1"
        self.note("loads")

    def note(self, what):
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{self.name} {what} {os.getpid()}\\n")

    def score(self, images, prompts):
        for _ in images:
            self.note("scores")
        return np.array([np.asarray(image).mean() for image in images])


class Second(First):
    name = "second"


class Third(First):
    name = "third"
"""

COUNTED_DECODING = """
import os
from PIL.PngImagePlugin import PngImageFile

load_end = PngImageFile.load_end

def counted(self):
    with open(os.environ["NOTES"], "a") as file:
        file.write(f"somebody decodes {os.getpid()}\\n")
    return load_end(self)

PngImageFile.load_end = counted
"""


@pytest.mark.long
def test_images_are_decoded_once_for_all_rewards_and_a_new_one_redoes_none(tmp_path):
    images = [encode(picture(seed=number), "PNG") for number in range(16)]
    rows = [{"prompt": "a", "image_0": one, "image_1": two} for one, two in zip(images[::2], images[1::2], strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (tmp_path / "noted.py").write_text(REWARDS)
    (tmp_path / "sitecustomize.py").write_text(COUNTED_DECODING)
    paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])

    def score(*names):
        notes = tmp_path / "-".join(names)
        # Pools grow with their backlog, so that each could start more than one actor.
        common = ("--out", tmp_path / "out", "--device", "cpu", "--concurrency", 1)
        pairs = ("--pairs", tmp_path / "pairs.parquet")
        specs = [f"noted:{name}" for name in names]
        done = run_command(
            *("smpo-pipeline", "score", *pairs, *common, "--reward", *specs),
            cwd=tmp_path,
            PYTHONPATH=paths,
            NOTES=str(notes),
        )
        assert done.returncode == 0, done.stderr
        return [line.split() for line in notes.read_text().splitlines()]

    notes = score("First", "Second")
    counts = Counter((who, what) for who, what, _ in notes)
    assert counts["somebody", "decodes"] == counts["first", "scores"] == counts["second", "scores"] == len(images)
    loaded = [(who, process) for who, what, process in notes if what == "loads"]
    # Once by the command, for the fingerprint, and once by the only actor.
    assert len(loaded) == len(set(loaded)) == 4

    counts = Counter((who, what) for who, what, _ in score("First", "Second", "Third"))
    assert ("first", "scores") not in counts
    assert ("second", "scores") not in counts
    assert counts["somebody", "decodes"] == counts["third", "scores"] == len(images)
    assert list(read_scores_info(tmp_path / "out").rewards) == ["first", "second", "third"]


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_a_prompt_is_encoded_once_however_many_images_it_has(folders, name, monkeypatch):
    reward = load_reward(f"{name}={folders[name]}", "cpu")
    encode_text, rows = reward._clip.get_text_features, []

    def counting(input_ids):
        rows.append(len(input_ids))
        return encode_text(input_ids=input_ids)

    monkeypatch.setattr(reward._clip, "get_text_features", counting)
    reward.score([picture(seed=number) for number in range(6)], ["a cat", "a dog"] * 3)
    assert sum(rows) == 2
