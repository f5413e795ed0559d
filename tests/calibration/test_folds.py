from __future__ import annotations

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.calibration.folds import split_by_prompt


def prompts(count=200):
    return [f"prompt {number}" for number in np.random.default_rng(0).integers(30, size=count)]


def test_a_prompt_is_in_one_fold_and_folds_are_of_like_size():
    texts = prompts()
    folds = split_by_prompt(texts, 4, seed=0)
    assert all(len({fold for fold, text in zip(folds, texts, strict=True) if text == each}) == 1 for each in set(texts))
    assert set(folds) == {0, 1, 2, 3}
    counts = np.bincount(folds)
    assert counts.max() - counts.min() <= max(texts.count(text) for text in set(texts))


def test_the_order_of_rows_does_not_matter_but_the_seed_does():
    texts = prompts()
    order = np.random.default_rng(1).permutation(len(texts))
    assert (split_by_prompt([texts[row] for row in order], 4, 0) == split_by_prompt(texts, 4, 0)[order]).all()
    assert (split_by_prompt(texts, 4, 1) != split_by_prompt(texts, 4, 0)).any()


def test_as_many_prompts_as_folds():
    assert sorted(split_by_prompt(["a", "b", "b", "c"], 3, 0)) in ([0, 1, 1, 2], [0, 0, 1, 2], [0, 1, 2, 2])
    with pytest.raises(UserError, match="--folds 4 .* 3$"):
        split_by_prompt(["a", "b", "b", "c"], 4, 0)
