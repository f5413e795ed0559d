"""Odd prompts get a score that does not depend on the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest

from smpo_pipeline.rewards import load_reward
from smpo_schemas.pairs import MAX_TEXT
from tests.fuzzing.mutate import HOSTILE_TEXTS, hostile_text
from tests.pictures import picture
from tests.rewards.conftest import MAKERS

PROMPTS = [text[:MAX_TEXT] for text in HOSTILE_TEXTS] + [hostile_text(random.Random(seed)) for seed in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.timeout(120)
def test_any_prompt_has_a_score(name, folders):
    reward = load_reward(f"{name}={folders[name]}", "cpu")
    prompts = [text[:MAX_TEXT] for text in PROMPTS]
    image = picture()
    scores = np.asarray(reward.score([image] * len(prompts), prompts))
    assert np.isfinite(scores).all()
    alone = [float(reward.score([image], [prompt])[0]) for prompt in prompts]
    np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-5)
