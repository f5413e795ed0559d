"""An image that several pairs of a chunk show under one prompt is decoded and scored once."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from smpo_pipeline.images.decoder import Decoder
from smpo_pipeline.jobs.record import progress
from smpo_pipeline.jobs.record.run_record import Run
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import (
    chunk_images,
    cut_chunks,
    pair_failures,
    pair_scores,
    with_scores,
    without_images,
)
from smpo_pipeline.jobs.score.collector import UnitCollector
from smpo_pipeline.rewards import Scored
from smpo_schemas.pairs import Pair
from tests.pictures import encode, picture
from tests.poison import Touchy

FILES = [encode(picture(20 + number, 9, seed=number), "PNG") for number in range(4)]
BYTES = 24 * 9 * 3
"""At least the size of any image, and less than half the size of three."""
BROKEN = b"nonsense"
seen: list[tuple[str, int]] = []


class Picky(Touchy):
    """Has no score for a picture of 21 pixels' width, and knows why."""

    name = "picky"

    def score_with_reasons(self, images, prompts):
        numbers = [number for number, image in enumerate(images) if image.width == 21]
        values = self.score(images, prompts)
        values[numbers] = np.nan
        return Scored(values, dict.fromkeys(numbers, "no answer: it is 21 wide"))


class Means(Touchy):
    """The mean of an image; remembers the images it has scored."""

    name = "means"

    def score(self, images, prompts):
        seen.extend((prompt, image.width) for image, prompt in zip(images, prompts, strict=True))
        return super().score(images, prompts)


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded."""
    files: list[bytes] = []
    decode = Decoder.decode
    monkeypatch.setattr(Decoder, "decode", lambda self, data: files.append(data) or decode(self, data))
    return files


def ranking(files, prompt: str = "a cat") -> list[tuple[str, Pair]]:
    """All pairs of some images."""
    pairs = enumerate(combinations(files, 2))
    return [(f"f:{number}", Pair(str(number), prompt, *pair, 1.0, None)) for number, pair in pairs]


def actor(work_log: WorkLog | None = None, reward: str = "Means") -> RewardActor:
    seen.clear()
    return RewardActor(f"{__name__}:{reward}", "0", "cpu", "fp32", 3, work_log or WorkLog(), share=0.5, last=True)


def means(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array([[np.asarray(picture(20 + n, 9, seed=n)).mean() for n in pair] for pair in pairs])


def test_each_image_of_a_ranking_is_decoded_and_scored_once(decoded):
    (chunk,) = cut_chunks(0, ranking(FILES))
    assert decoded == FILES
    scored = actor()(chunk)
    assert seen == [("a cat", 20 + number) for number in range(4)]
    np.testing.assert_allclose(pair_scores(scored, "means"), means(*combinations(range(4), 2)), rtol=1e-6)


def test_each_batch_is_reported_as_a_part_of_the_pairs(monkeypatch):
    """Four images of six pairs, in batches of three; another reward reports the other half of the work."""
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0)
    counts, reported = WorkLog(), []
    report = counts.report
    monkeypatch.setattr(counts, "report", lambda *what: (report(*what), reported.append(counts.pairs_in_progress())))
    (chunk,) = cut_chunks(5, ranking(FILES))
    actor(counts)(chunk)
    assert reported == [pytest.approx(6 * 0.5 * 3 / 4), pytest.approx(6 * 0.5)]
    counts.retire(5)
    assert counts.pairs_in_progress() == 0


def test_an_image_with_another_prompt_is_scored_again_but_not_decoded_again(decoded):
    (chunk,) = cut_chunks(0, [*ranking(FILES[:2]), *ranking(FILES[:2], "a dog"), *ranking(FILES[:2])])
    assert decoded == FILES[:2]
    scored = actor()(chunk)
    assert seen == [("a cat", 20), ("a cat", 21), ("a dog", 20), ("a dog", 21)]
    np.testing.assert_allclose(pair_scores(scored, "means"), means((0, 1), (0, 1), (0, 1)), rtol=1e-6)


def test_a_pair_of_an_image_and_itself():
    (chunk,) = cut_chunks(0, ranking([FILES[0], FILES[0]]))
    assert len(list(chunk_images(chunk))) == 1
    np.testing.assert_allclose(pair_scores(actor()(chunk), "means"), means((0, 0)), rtol=1e-6)


@pytest.mark.parametrize("most", [2, 3])
def test_an_image_on_both_sides_of_a_cut_is_decoded_once(monkeypatch, decoded, most):
    """The preferred image is compared again: 0-1, 1-2, 2-3."""
    monkeypatch.setattr("smpo_pipeline.jobs.score.chunks.CHUNK_BYTES", most * BYTES)
    rows = [row for first in range(3) for row in ranking(FILES[first : first + 2])]
    chunks = list(cut_chunks(0, rows))
    assert [len(list(chunk_images(chunk))) for chunk in chunks] == {2: [2, 2, 2], 3: [3, 2]}[most]
    assert decoded == FILES
    scores = np.concatenate([pair_scores(actor()(chunk), "means") for chunk in chunks])
    np.testing.assert_allclose(scores, means((0, 1), (1, 2), (2, 3)), rtol=1e-6)


def test_an_image_of_a_rejected_pair_is_kept_for_the_next_pair():
    rows = [*ranking([FILES[0], BROKEN]), *ranking(FILES[:2])]
    (chunk,) = cut_chunks(0, rows)
    assert [reason is None for reason in chunk["reason"][0].as_py()] == [False, True]
    np.testing.assert_allclose(pair_scores(actor()(chunk), "means"), means((0, 1)), rtol=1e-6)


def test_a_failing_image_rejects_exactly_its_pairs(tmp_path):
    green = encode(Image.new("RGB", (20, 9), (0, 255, 0)), "PNG")
    run = Run(tmp_path / ".scoring", "scores.json", {})
    run.open(overwrite=False, patterns=())
    (chunk,) = cut_chunks(0, ranking([*FILES[:2], green]))
    scored = actor()(chunk)
    assert [reason is None for reason in pair_failures(scored, "means")] == [True, False, False]
    (record,) = UnitCollector(run, ["means"], 1.0)(scored)
    assert (record.pairs_in, record.pairs) == (3, 1)
    assert [reject.pair_id for reject in record.rejects] == ["1", "2"]
    assert all("(means)" in reject.reason for reject in record.rejects)


@pytest.mark.parametrize("failing", [False, True])
def test_a_rewards_own_reason_is_that_of_the_pair(tmp_path, failing):
    """Also if another image of the batch fails, so that the others are scored without it."""
    green = encode(Image.new("RGB", (20, 9), (0, 255, 0)), "PNG")
    (chunk,) = cut_chunks(0, ranking([green, *FILES] if failing else FILES))
    why = pair_failures(actor(reward="Picky")(chunk), "picky")
    pairs = list(combinations(range(5), 2)) if failing else list(combinations(range(1, 5), 2))
    assert [reason for reason, pair in zip(why, pairs, strict=True) if 0 not in pair] == [
        "no answer: it is 21 wide" if 2 in pair else None for pair in pairs if 0 not in pair
    ]
    run = Run(tmp_path / ".scoring", "scores.json", {})
    run.open(overwrite=False, patterns=())
    (record,) = UnitCollector(run, ["picky"], 1.0)(actor(reward="Picky")(chunk))
    assert "no answer: it is 21 wide (picky)" in {reject.reason for reject in record.rejects}


def test_a_nan_score_belongs_to_exactly_its_pairs():
    (chunk,) = cut_chunks(0, ranking(FILES[:3]))
    scored = without_images(with_scores(chunk, {"means": np.array([1.0, np.nan, 3.0])}))
    np.testing.assert_array_equal(pair_scores(scored, "means"), [[1, np.nan], [1, 3], [np.nan, 3]])
