"""``select`` with a judge and a method of your own."""

from __future__ import annotations

import hashlib

import pytest
from PIL import Image

from smpo_schemas.generation.selection import read_selection
from smpo_schemas.pairs import image_id
from smpo_schemas.rejects import read_rejects
from tests.pictures import encode
from tests.selection.helpers import PROMPTS, image_of, make_candidates, rows_of

OWN = """
from smpo_pipeline.selection.judges import PairwiseJudge
from smpo_pipeline.selection.methods import Proposal, Selection

class Brightest(PairwiseJudge):
    name = "brightest"
    def compare(self, first, second, prompt):
        one, two = (sum(image.pixels().convert("L").getdata()) for image in (first, second))
        return 0.5 if one == two else float(one > two)

class Broken(PairwiseJudge):
    name = "broken"
    def compare(self, first, second, prompt):
        if prompt == "a cat":
            raise RuntimeError("the server is busy")
        return 1.0 if first.image_id > second.image_id else 0.0

class FirstTwo(Selection):
    name, summary = "first-two", "the two images of smallest hash"
    def propose(self, candidates):
        yield Proposal(0, 1, 0.25)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_selection.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own")
def test_a_judge_of_your_own_that_looks_at_images(select, tmp_path):
    def image(prompt: str, index: int) -> bytes:
        level = {"a cat": (10, 200, 90), "a dog": (50, 40, 30)}[prompt][index]
        return encode(Image.new("RGB", (8, 8), (level, level, level)), "PNG")

    prompts = {"a cat": [(0.0,)] * 2 + [(1.0,)], "a dog": [(0.0,)] * 3}
    made = make_candidates(tmp_path / "in", prompts, ("a",), image=image, order=[2, 0, 3, 1])
    done = select(*made, tmp_path / "out", "--judge", "my_selection:Brightest", by="ranking")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    chosen = {prompt: row[f"noise_{row['chosen_image']}"]["index"] for prompt, row in rows.items()}
    rejected = {prompt: row[f"noise_{1 - row['chosen_image']}"]["index"] for prompt, row in rows.items()}
    assert (chosen, rejected) == ({"a cat": 1, "a dog": 0}, {"a cat": 0, "a dog": 2})
    assert {row["gap"] for row in rows.values()} == {1.0}
    settings = read_selection(tmp_path / "out").settings
    assert settings.judge_sha256 == hashlib.sha256(OWN.encode()).hexdigest()


@pytest.mark.usefixtures("own")
def test_a_prompt_that_a_judge_cannot_compare_is_rejected(select, made, tmp_path):
    done = select(*made, tmp_path / "out", "--judge", "my_selection:Broken", by="ranking")
    assert done.returncode == 0, done.stderr
    reasons = {each.reason for each in read_rejects(tmp_path / "out" / "rejected.parquet")}
    assert "judge failed: the server is busy; 4 images of 'a cat'" in reasons


@pytest.mark.usefixtures("own")
def test_a_method_of_your_own(select, made, tmp_path):
    done = select(*made, tmp_path / "out", by="my_selection:FirstTwo")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {"a cat", "a dog", "equal", "two"}
    for prompt, row in rows.items():
        ids = sorted(image_id(image_of(prompt, index)) for index in range(len(PROMPTS[prompt])))
        assert sorted(image_id(row[f"image_{side}"]) for side in (0, 1)) == ids[:2]
        assert (row["gap"], row["annotator"]) == (0.25, "select:first-two")
