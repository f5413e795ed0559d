from __future__ import annotations

import numpy as np
import pytest

from smpo_common.files import sha256_file
from smpo_pipeline.calibration import cross_validation
from smpo_pipeline.calibration.calibrate import calibrate
from smpo_pipeline.calibration.cross_validation import (
    COIN,
    EQUAL_MIXTURE,
    FITTED,
    MINMAX,
    MIXTURE,
    SHARP_MINMAX,
    cross_validate,
)
from smpo_pipeline.calibration.fit import fit_mixture
from smpo_pipeline.calibration.labels import read_labelled
from smpo_pipeline.calibration.measures import log_loss
from tests.calibration.helpers import labelled, populations, write_scores


def validate(data, folds=4):
    return cross_validate(data, folds, 0, lambda _: None)


@pytest.mark.slow
def test_a_fold_is_predicted_from_the_others_alone(tmp_path):
    """Invert the labels of one fold: its own predictions stay, those of the other folds change."""
    scores, _, labels, prompts = populations(300)
    data = labelled(tmp_path / "s", scores, labels, prompts)
    found = validate(data)
    assert len(set(zip(prompts, found.fold_P.tolist(), strict=True))) == len(set(prompts))
    inside = found.fold_P == 2
    turned = np.where(inside, 1 - np.array(labels), labels)
    other = validate(labelled(tmp_path / "t", scores, turned.tolist(), prompts))
    assert (other.fold_P == found.fold_P).all()
    for name in (MIXTURE, EQUAL_MIXTURE, SHARP_MINMAX, "one" + FITTED):
        np.testing.assert_array_equal(other.p[name][inside], found.p[name][inside])
        assert (other.p[name][~inside] != found.p[name][~inside]).mean() > 0.9


def test_predictions_by_a_simple_implementation(tmp_path):
    scores, _, labels, prompts = populations(200)
    found = validate(labelled(tmp_path / "s", scores, labels, prompts))
    margin = np.stack([each[:, 0] - each[:, 1] for each in scores.values()], axis=1)
    # float32, as the table stores them.
    stored = [each.astype(np.float32).astype(np.float64) for each in scores.values()]
    scaled = sum((each[:, 0] - each[:, 1]) / (each.max() - each.min()) for each in stored)
    np.testing.assert_allclose(found.p[MINMAX], 1 / (1 + np.exp(-scaled)), rtol=1e-6)
    assert set(found.p[COIN]) == {0.5}
    for fold in range(4):
        test = found.fold_P == fold
        fit = fit_mixture(margin[~test], np.array(labels)[~test])
        p = sum(w / (1 + np.exp(-margin[test, k] / fit.tau_K[k])) for k, w in enumerate(fit.weight_K))
        np.testing.assert_allclose(found.p[MIXTURE][test], p, atol=1e-5)


def test_rows_without_a_label_are_no_labels(tmp_path):
    scores, _, labels, prompts = populations(200)
    some = [None if row % 3 == 0 else label for row, label in enumerate(labels)]
    found = validate(labelled(tmp_path / "s", scores, some, prompts))
    assert (np.isnan(found.p[MIXTURE]) == (found.fold_P == -1)).all()
    assert np.flatnonzero(found.fold_P == -1).tolist() == list(range(0, 200, 3))


@pytest.mark.slow
def test_the_mixture_that_made_the_labels_is_the_best_and_is_written(tmp_path):
    scores, _, labels, prompts = populations(3000)
    folder = write_scores(tmp_path / "s", scores, labels, prompts)
    report = calibrate(folder, [], folds=5, seed=0)
    found = report.calibration
    losses = {name: fit.log_loss for name, fit in found.held_out.items()}
    assert min(losses, key=losses.__getitem__) == MIXTURE
    assert found.weights == "fitted"
    assert found.held_out[MIXTURE].calibration_error < 0.03 < found.held_out["one"].calibration_error
    assert found.rewards["one"].weight == pytest.approx(0.7, abs=0.08)
    assert (found.labels, found.ties, found.prompts) == (3000, 150, 40)
    assert found.scores_sha256 == sha256_file(folder / "scores.json")
    decided = np.array(labels) != 0.5
    assert losses[MIXTURE] == pytest.approx(log_loss(report.held_out.p[MIXTURE], np.array(labels)))
    assert found.held_out["one"].agreement == np.mean(
        (scores["one"][decided, 0] > scores["one"][decided, 1]) == (np.array(labels)[decided] == 1)
    )
    # Equal runs give equal results.
    assert calibrate(folder, [], folds=5, seed=0).calibration == found


@pytest.mark.parametrize(("seed", "equal_is_better"), [(4, False), (5, True)])
def test_equal_weights_are_taken_where_they_do_better(tmp_path, seed, equal_is_better):
    """With few labels and two similar rewards, fitted weights mostly follow chance."""
    stream = np.random.default_rng(seed)
    quality = stream.normal(size=(60, 2))
    scores = {name: quality + 0.3 * stream.normal(size=(60, 2)) for name in ("one", "two")}
    margin = quality[:, 0] - quality[:, 1]
    labels = (stream.random(60) < 1 / (1 + np.exp(-2 * margin))).astype(float).tolist()
    images = [(f"{row}-0", f"{row}-1") for row in range(60)]
    data = labelled(tmp_path / "s", scores, labels, [f"p{row}" for row in range(60)], images=images)
    found = validate(data)
    equal, fitted = (log_loss(found.p[name], np.array(labels)) for name in (EQUAL_MIXTURE, MIXTURE))
    assert found.equal_weights == (equal < fitted) == equal_is_better
    assert found.chosen == (EQUAL_MIXTURE if equal_is_better else MIXTURE)
    assert found.mixture is (found.final.equal if equal_is_better else found.final.fitted)
    # With two images per prompt, the calibrated win rate equals the mixture.
    np.testing.assert_allclose(found.p["winrate, calibrated"], found.p[found.chosen], rtol=1e-12)


def test_winrate_needs_image_hashes_and_one_reward_needs_no_mix(tmp_path):
    scores, _, labels, prompts = populations(100)
    images = [(f"{row}-0", f"{row}-1") for row in range(100)]
    found = validate(labelled(tmp_path / "s", scores, labels, prompts, images=images))
    assert {"winrate", "winrate, calibrated"} <= set(found.p)
    alone = validate(labelled(tmp_path / "t", {"one": scores["one"]}, labels, prompts))
    assert set(alone.p) == {COIN, "one", "one" + FITTED, MIXTURE}
    np.testing.assert_allclose(alone.p[MIXTURE], alone.p["one" + FITTED], rtol=1e-5)
    assert not alone.equal_weights


def test_only_some_rewards(tmp_path):
    scores, _, labels, prompts = populations(100)
    folder = write_scores(tmp_path / "s", scores, labels, prompts)
    assert list(read_labelled(folder, ["two"]).statistics) == ["two"]
    assert cross_validation.MIXTURE in validate(read_labelled(folder, ["two"])).p
