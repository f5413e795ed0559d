"""``--preference votes`` and ``votes-mixture``: from shards and from a table, with and without a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_trainer.preference.preference_table import pooled_votes
from tests.trainer.helpers import arguments, make_shards, run_cli
from tests.trainer.preference.test_reward_mix import NAMES, Mix, s, scored, table

NAN = float("nan")


def test_votes_of_shards_need_no_reward(mix: Mix, two: Path, calibration: Path) -> None:
    """A label without a number of votes is one vote."""
    strength = json.loads(calibration.read_text())["votes"]["strength"]
    for given, prior in ((None, 2.0), (calibration, strength)):
        resolved = mix(preference="votes", calibration=given) if given else mix(preference="votes")
        expected = [(meta.label + prior / 2) / (1 + prior) for meta in scored(two)]
        np.testing.assert_allclose(resolved.preferences(scored(two)), expected, rtol=1e-12)
        assert resolved.identity()["calibration"] == {"strength": prior}
    with pytest.raises(UserError, match="--preference votes uses no rewards; leave out --reward taste"):
        mix(preference="votes", reward=["taste"])


def test_votes_mixture_has_the_mixtures_p_as_prior(mix: Mix, two: Path, calibration: Path) -> None:
    fitted = json.loads(calibration.read_text())
    prior = fitted["votes"]["mixture_strength"]
    metas = [meta.model_copy(update={"label": None}) if row == 1 else meta for row, meta in enumerate(scored(two))]
    metas[2] = metas[2].model_copy(update={"label": 0.25, "votes": 8})
    resolved = mix(preference="votes-mixture", calibration=calibration).preferences(metas)
    for p, meta in zip(resolved, metas, strict=True):
        m = sum(
            fitted["rewards"][n]["weight"] * s((meta.scores[n][0] - meta.scores[n][1]) / fitted["rewards"][n]["tau"])
            for n in NAMES
        )
        votes = 0 if meta.label is None else meta.votes or 1
        assert p == pytest.approx(((meta.label or 0) * votes + prior * m) / (votes + prior), rel=1e-12)


def test_rows_of_a_pair_in_a_table_count_together(mix: Mix, two: Path, tmp_path: Path) -> None:
    """Three people label the first pair, one of them with a share of four votes; the last pair has no label."""
    rows = [0, 0, 0, 1, 2, 3, 4, 5]
    metas = [scored(two)[row] for row in rows]
    columns = {
        "scores": {name: np.array([meta.scores[name] for meta in metas]) for name in NAMES},
        "labels": [1.0, 0.0, 0.75, 1.0, 0.0, 1.0, 0.0, None],
        "prompts": [meta.prompt for meta in metas],
        "images": [(f"{meta.pair_id}-0", f"{meta.pair_id}-1") for meta in metas],
        "pair_ids": [meta.pair_id for meta in metas],
    }
    folder = table(tmp_path / "scores", two, **columns)
    (part,) = folder.glob("*.parquet")
    written = pq.read_table(part)
    votes = pa.array([None, None, 4, 20, None, None, None, None], pa.int32())
    pq.write_table(written.set_column(written.column_names.index("votes"), "votes", votes), part)
    said: list[str] = []
    resolved = mix(preference="votes", scores=folder, said=said).preferences(scored(two))
    expected = [(4 + 1) / (6 + 2), (20 + 1) / (20 + 2), 1 / 3, 2 / 3, 1 / 3, NAN]
    np.testing.assert_allclose(resolved, expected, rtol=1e-12)
    assert "their votes count together" in said[0]


def test_pooled_votes_by_hand() -> None:
    labels, votes = pooled_votes(["b", "a", "b", "c"], np.array([1.0, NAN, 0.25, 0.5]), np.array([NAN, 9.0, 3.0, 2.0]))
    np.testing.assert_allclose(labels, [1.75 / 4, NAN, 1.75 / 4, 0.5])
    np.testing.assert_allclose(votes, [4, NAN, 4, 2])


def test_without_any_label_there_is_nothing_to_train_on(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    shards = make_shards(tmp_path / "shards", model, num_states=2, labels=(None,))
    assert run_cli(monkeypatch, arguments(shards, model, tmp_path / "out", preference="votes")) != 0
    assert "trajectories have a label, as --objective smpo needs" in capsys.readouterr().err
