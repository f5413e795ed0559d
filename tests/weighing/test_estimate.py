"""The classifiers on data whose densities are known."""

from __future__ import annotations

import numpy as np
import pytest

from smpo_common.errors import UserError
from smpo_pipeline.weighing.estimate import auc, fit_sources
from smpo_pipeline.weighing.formula import GOLDEN, image_weights

PAIRS = 4000


def gaussians(source_mean=1.0, pairs=PAIRS):
    """One feature, N(0, 1) for a quarter of golden pairs, N(mean, 1) for the source; prompts have pairs of both."""
    stream = np.random.default_rng(0)
    source = np.where(stream.random(pairs) < 0.25, GOLDEN, 0)
    mean = np.where(source == GOLDEN, 0.0, source_mean)
    x = mean[:, None, None] + stream.normal(size=(pairs, 2, 1))
    return x, [f"prompt {number}" for number in stream.integers(500, size=pairs)], source


def test_weights_are_the_true_density_ratio():
    x, prompts, source = gaussians(pairs=20000)
    (fit,) = fit_sources(x, prompts, source, ["web"], 5, 0)
    share = (source == GOLDEN).mean()
    found = image_weights(fit.c_P2[..., None], source, share, np.array([1 - share]))
    # p_source / p_golden = exp(x - 1/2)
    true = 1 / (share + (1 - share) * np.exp(x[..., 0] - 0.5))
    assert np.abs(np.log(found / true)).max() < 0.1
    assert found.mean() == pytest.approx(1, abs=0.03)
    # P(N(0, 1) < N(1, 1)) = Phi(1 / sqrt 2)
    assert fit.auc == pytest.approx(0.7602, abs=0.015)
    assert fit.calibration_error < 0.03
    assert not fit.noise


def test_equal_distributions_weigh_the_same():
    x, prompts, source = gaussians(source_mean=0.0)
    (fit,) = fit_sources(x, prompts, source, ["web"], 5, 0)
    share = (source == GOLDEN).mean()
    found = image_weights(fit.c_P2[..., None], source, share, np.array([1 - share]))
    assert np.abs(found - 1).max() < 0.1
    assert fit.auc == pytest.approx(0.5, abs=0.03)
    assert fit.noise


def test_each_source_has_its_own_classifier():
    x, prompts, source = gaussians()
    two = np.where(source == 0, np.arange(PAIRS) % 2, source)
    far = x + 2.0 * (two == 1)[:, None, None]
    near_fit, far_fit = fit_sources(far, prompts, two, ["near", "far"], 5, 0)
    assert near_fit.auc == pytest.approx(0.7602, abs=0.02)
    assert far_fit.auc == pytest.approx(0.983, abs=0.01)  # Phi(3 / sqrt 2)


def test_no_image_is_weighed_by_a_fit_that_has_seen_its_prompt():
    """Features that say which prompt it is, and nothing of its class beyond that."""
    stream = np.random.default_rng(0)
    source = np.repeat(np.where(np.arange(60) % 2, GOLDEN, 0), 3)
    x = np.repeat(stream.normal(size=(60, 2, 120)), 3, axis=0)  # three pairs of a prompt, all alike
    by_prompt = [str(row // 3) for row in range(180)]
    (fit,) = fit_sources(x, by_prompt, source, ["web"], 5, 0)
    assert fit.noise
    assert abs(fit.auc - 0.5) < 0.15
    (leaking,) = fit_sources(x, [str(row) for row in range(180)], source, ["web"], 5, 0)
    assert leaking.auc > 0.8


def test_prompts_must_suffice():
    x, prompts, _ = gaussians()
    lonely = np.where(np.array(prompts) == prompts[0], GOLDEN, 0)
    with pytest.raises(UserError, match="all pairs of golden are in one of the --folds 5"):
        fit_sources(x, prompts, lonely, ["web"], 5, 0)


def test_auc_by_hand():
    assert auc(np.array([1.0, 3.0]), np.array([0.0, 2.0])) == 0.75
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5
