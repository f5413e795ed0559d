"""Scores in half precision: close to float32 with the same weights, and never in one table under the same name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smpo_common.errors import UserError
from smpo_models.weights import DTYPES
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.actor import RewardActor
from smpo_pipeline.jobs.score.chunks import chunk_images, cut_chunks, pair_scores
from smpo_pipeline.jobs.score.job import _refuse_other_weights
from smpo_pipeline.jobs.score.table import RewardRecord
from smpo_pipeline.rewards import load_reward
from smpo_schemas.pairs import Pair
from smpo_schemas.scoring.scores import ScoresInfo, reward_statistics
from tests.pictures import encode, picture
from tests.rewards.conftest import MAKERS

ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11}


def chunk():
    """Twelve images under six prompts, one of them empty."""
    rows = []
    for number in range(6):
        images = [encode(picture(40 + number, 30, seed=2 * number + index)) for index in range(2)]
        rows.append((f"file:{number}", Pair(str(number), "cat " * number, *images, label=None, annotator=None)))
    return next(iter(cut_chunks(0, rows)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", MAKERS)
def test_scores_differ_by_rounding_alone(folders, name, dtype):
    spec, images = f"{name}={folders[name]}", chunk()
    reward = load_reward(spec, "cpu")
    options = {"batch_size": 5, "work_log": WorkLog(), "share": 1, "last": False}
    scored = RewardActor(spec, reward.fingerprint, "cpu", dtype, **options)(images)
    found = pair_scores(scored, name).reshape(-1)
    pictures, prompts = zip(*chunk_images(images), strict=True)
    exact = reward.score(pictures, prompts)
    if dtype == "fp32":
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
        return
    apart = np.abs(found - exact)
    assert apart.max() > 0
    # Dozens of matrix products in a row, each rounded once.
    assert apart.max() < 16 * ROUNDING[dtype] * max(1.0, np.abs(exact).max())
    # The products are rounded, the score is not: bf16 would round a rating of 5 to multiples of 1/32.
    assert (torch.tensor(found).to(DTYPES[dtype]).double().numpy() != found).all()


def test_two_precisions_of_one_reward_are_refused(tmp_path):
    scores = reward_statistics(
        np.array([[0.1, 0.2]]), np.array([1.0]), model="hub/a", fingerprint="f", unit="cosine", dtype="bf16"
    )
    base = ScoresInfo(schema_version=1, rewards={"a": scores}, parts=[], scored=1, rejected=0)
    _refuse_other_weights(tmp_path, base, {"a": RewardRecord("hub/a", "f", "cosine", "bf16")})
    with pytest.raises(UserError, match=rf"{tmp_path} .*bf16.*--dtype.* fp32.*--overwrite"):
        _refuse_other_weights(tmp_path, base, {"a": RewardRecord("hub/a", "f", "cosine", "fp32")})
