"""From flags to the preference of every pair: mixes, calibrations, ranges, and scores from a table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smpo_common.errors import UserError
from smpo_common.named_values import parse_ranges
from smpo_schemas.scoring.scores import read_scores_info, write_scores_info
from smpo_schemas.shards.reader import ShardDirectory
from smpo_trainer.preference.reward_mix import RewardMix
from tests.calibration.helpers import write_scores
from tests.trainer.conftest import Train
from tests.trainer.helpers import arguments, run_cli

Mix = Callable[..., RewardMix]
NAMES = ("taste", "sharpness")


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def table(folder: Path, shards: Path, names: Sequence[str] = NAMES, **changes) -> Path:
    """A scores table of the shards' own pairs."""
    metas = [sample.meta for sample in ShardDirectory(shards).samples()]
    columns = {
        "scores": {name: np.array([meta.scores[name] for meta in metas]) for name in names},
        "labels": [None] * len(metas),
        "prompts": [meta.prompt for meta in metas],
        "images": [(f"{meta.pair_id}-0", f"{meta.pair_id}-1") for meta in metas],
        "pair_ids": [meta.pair_id for meta in metas],
    }
    return write_scores(folder, **{**columns, **changes})


def scored(shards: Path) -> list:
    return [sample.meta for sample in ShardDirectory(shards).samples()]


def test_mixture_uses_weights_and_temperatures_of_the_calibration(mix: Mix, two: Path, calibration: Path) -> None:
    rewards = json.loads(calibration.read_text())["rewards"]
    resolved = mix(preference="mixture", calibration=calibration).preferences(scored(two))
    for p, meta in zip(resolved, scored(two), strict=True):
        terms = [rewards[n]["weight"] * s((meta.scores[n][0] - meta.scores[n][1]) / rewards[n]["tau"]) for n in NAMES]
        assert p == pytest.approx(sum(terms), rel=1e-12)


def test_given_rewards_override_the_weights_of_the_calibration(mix: Mix, two: Path, calibration: Path) -> None:
    rewards = json.loads(calibration.read_text())["rewards"]
    said: list[str] = []
    resolved = mix(preference="mixture", calibration=calibration, reward=["taste:3", "sharpness"], said=said)
    for p, meta in zip(resolved.preferences(scored(two)), scored(two), strict=True):
        of = [s((meta.scores[n][0] - meta.scores[n][1]) / rewards[n]["tau"]) for n in NAMES]
        assert p == pytest.approx((3 * of[0] + of[1]) / 4, rel=1e-12)
    assert said == []


def test_one_reward_has_the_temperature_that_was_fitted_to_it_alone(mix: Mix, two: Path, calibration: Path) -> None:
    """As in the row "taste, tau fitted" of ``calibrate``."""
    fitted = json.loads(calibration.read_text())["rewards"]["taste"]
    assert abs(math.log(fitted["tau_alone"] / fitted["tau"])) > 0.1
    said: list[str] = []
    resolved = mix(preference="mixture", calibration=calibration, reward=["taste"], said=said)
    expected = [s((meta.scores["taste"][0] - meta.scores["taste"][1]) / fitted["tau_alone"]) for meta in scored(two)]
    np.testing.assert_allclose(resolved.preferences(scored(two)), expected, rtol=1e-12)
    assert resolved.identity()["calibration"] == {"taste": fitted["tau_alone"]}
    assert said == []


def test_a_subset_of_the_calibrated_rewards_keeps_its_temperatures_with_a_warning(
    mix: Mix, two: Path, calibration: Path, tmp_path: Path
) -> None:
    value = json.loads(calibration.read_text())
    value["rewards"]["third"] = {**value["rewards"]["taste"], "weight": 0.0}
    (tmp_path / "three.json").write_text(json.dumps(value))
    said: list[str] = []
    resolved = mix(preference="mixture", calibration=tmp_path / "three.json", reward=list(NAMES), said=said)
    assert resolved.temperatures == {name: value["rewards"][name]["tau"] for name in NAMES}
    (warning,) = said
    assert warning.startswith("WARNING: --reward")
    assert "2 of the 3 rewards" in warning
    assert "`smpo-pipeline calibrate --reward`" in warning


def test_a_range_replaces_that_of_the_data_set(mix: Mix, two: Path) -> None:
    resolved = mix(reward=["taste:2"], reward_range=["taste=-1:3"])
    expected = [s(2 * (meta.scores["taste"][0] - meta.scores["taste"][1]) / 4) for meta in scored(two)]
    np.testing.assert_allclose(resolved.preferences(scored(two)), expected, rtol=1e-12)
    assert resolved.identity()["reward_range"] == {"taste": [-1.0, 3.0]}


def test_winrate_counts_all_images_of_a_prompt_in_the_table(mix: Mix, two: Path, tmp_path: Path) -> None:
    """Pairs 0 and 5 have one prompt and share an image: three images; all other prompts have one pair."""
    metas = scored(two)
    assert metas[0].prompt == metas[5].prompt
    scores = {name: np.array([meta.scores[name] for meta in metas]) for name in NAMES}
    scores["taste"][5, 0] = scores["taste"][0, 1]
    images = [(f"{row}-0", f"{row}-1") for row in range(6)]
    images[5] = ("0-1", "5-1")
    folder = table(tmp_path / "scores", two, scores=scores, images=images)
    resolved = mix(preference="winrate", scores=folder, reward=["taste"]).preferences(metas)
    stored = scores["taste"].astype(np.float32).astype(float)
    size = scores["taste"].max() - scores["taste"].min()
    a, b, c = stored[0, 0] / size, stored[0, 1] / size, stored[5, 1] / size
    rates = [(s(a - b) + s(a - c)) / 2, (s(b - a) + s(b - c)) / 2, (s(c - a) + s(c - b)) / 2]
    assert resolved[0] == pytest.approx((1 + rates[0] - rates[1]) / 2, rel=1e-12)
    assert resolved[5] == pytest.approx((1 + rates[1] - rates[2]) / 2, rel=1e-12)
    assert resolved[1] == pytest.approx(s((stored[1, 0] - stored[1, 1]) / size), rel=1e-12)


def test_scores_from_a_table_give_what_the_shards_own_give(mix: Mix, two: Path, tmp_path: Path) -> None:
    own = mix(reward=["taste", "sharpness:0.5"], reward_range=["taste=0:1", "sharpness=0:1"])
    other = mix(
        reward=["taste", "sharpness:0.5"],
        reward_range=["taste=0:1", "sharpness=0:1"],
        scores=table(tmp_path / "t", two),
    )
    np.testing.assert_allclose(other.preferences(scored(two)), own.preferences(scored(two)), atol=1e-7)


def test_the_used_columns_of_a_table_are_part_of_the_identity(mix: Mix, two: Path, tmp_path: Path) -> None:
    folder = table(tmp_path / "t", two)
    (part,) = folder.glob("*.parquet")
    rows = pq.read_table(part)

    def identity(changed: pa.Table) -> object:
        pq.write_table(changed, part)  # in place: scores.json stays as it is
        return mix(reward=["taste"], scores=folder).identity()["scores"]

    def replaced(name: str, value: object) -> pa.Table:
        position = rows.column_names.index(name)
        values = [value, *rows[name].to_pylist()[1:]]
        return rows.set_column(position, name, pa.array(values, rows.schema.field(name).type))

    before = identity(rows)
    assert identity(rows.append_column("trust", pa.array([1.0] * len(rows)))) == before
    assert identity(replaced("sharpness_0", 0.25)) == before
    for name, value in (("taste_1", 0.25), ("prompt", "another"), ("pair_id", "another")):
        assert identity(replaced(name, value)) != before


def test_a_pair_with_another_prompt_is_another_pair(mix: Mix, two: Path, tmp_path: Path) -> None:
    prompts = [meta.prompt for meta in scored(two)]
    prompts[1] = "a " * 100
    resolved = mix(reward=["taste"], scores=table(tmp_path / "t", two, prompts=prompts))
    with pytest.raises(UserError, match="--scores .*pair pair-1 is 'a a .*'a dog and a cat'"):
        resolved.preferences(scored(two))


def test_repeated_pair_ids(mix: Mix, two: Path, tmp_path: Path) -> None:
    """A pair may repeat with another label and scores from another batch; another pair may not have its id."""
    metas = [*scored(two), scored(two)[2]]
    scores = {name: np.array([meta.scores[name] for meta in metas]) for name in NAMES}
    again = {
        "labels": [None] * 7,
        "prompts": [meta.prompt for meta in metas],
        "images": [("a", "b")] * 7,
        "pair_ids": [meta.pair_id for meta in metas],
    }
    scores["taste"][6] += 2e-5
    said: list[str] = []
    resolved = mix(reward=["taste"], scores=table(tmp_path / "fine", two, scores=scores, **again), said=said)
    assert len(said) == 1
    assert "1 of 7 rows" in said[0]
    assert np.isfinite(resolved.preferences(scored(two))).all()
    scores["taste"][6, 1] += 0.01
    with pytest.raises(UserError, match="--scores .*pair-2 .rows 2 and 6 .*scores of taste.*--pair-id-column"):
        mix(reward=["taste"], scores=table(tmp_path / "apart", two, scores=scores, **again))
    # In half precision the difference is within rounding.
    info = read_scores_info(tmp_path / "apart")
    half = info.rewards["taste"].model_copy(update={"dtype": "bf16"})
    write_scores_info(tmp_path / "apart", info.model_copy(update={"rewards": {**info.rewards, "taste": half}}))
    assert np.isfinite(mix(reward=["taste"], scores=tmp_path / "apart").preferences(scored(two))).all()
    scores["taste"][6] = scores["taste"][2]
    again["prompts"][6] = "another"
    with pytest.raises(UserError, match="different prompts"):
        mix(reward=["taste"], scores=table(tmp_path / "other", two, scores=scores, **again))


def test_flags_that_do_not_fit(mix: Mix, two: Path, calibration: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: object) -> None:
        with pytest.raises(UserError, match=match):
            mix(**options)

    refused("--preference nonsense; known: minmax, mixture, votes, votes-mixture, winrate", preference="nonsense")
    refused("mixture needs --calibration FILE; make it with `smpo-pipeline calibrate`", preference="mixture")
    refused("minmax takes no --calibration", calibration=calibration)
    refused(
        "--calibration .*none.json does not exist.*smpo-pipeline calibrate",
        preference="mixture",
        calibration=tmp_path / "none.json",
    )
    refused("--preference winrate .*`smpo-pipeline score` with --scores", preference="winrate", reward=["taste"])
    unnamed = table(tmp_path / "unnamed", two, images=None)
    refused("--preference winrate .*smpo-pipeline score", preference="winrate", reward=["taste"], scores=unnamed)
    calibrated = {"preference": "mixture", "calibration": calibration}
    refused(f"--reward-range .* --calibration {calibration}", reward_range=["taste=0:1"], **calibrated)
    refused("--reward taste:-1:", reward=["taste:-1"], **calibrated)
    refused(
        "--reward-range sharpness: .*taste",
        reward=["taste"],
        reward_range=["sharpness=0:1"],
    )
    value = json.loads(calibration.read_text())
    value["rewards"]["taste"]["fingerprint"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(value))
    refused(
        f"--calibration {tmp_path / 'other.json'}: .*'taste'.*smpo-pipeline calibrate",
        preference="mixture",
        calibration=tmp_path / "other.json",
    )
    value["rewards"] = {"lost": {**value["rewards"]["taste"], "weight": 1.0}}
    (tmp_path / "lost.json").write_text(json.dumps(value))
    refused("--calibration has the reward lost: .*--shards", preference="mixture", calibration=tmp_path / "lost.json")
    refused(
        "--reward taste: not in --calibration",
        preference="mixture",
        calibration=tmp_path / "lost.json",
        reward=["taste"],
    )


@pytest.mark.parametrize(
    "text", ["taste", "taste=1", "taste=2:1", "taste=1:1", "taste=a:b", "=0:1", "taste=0:inf", "t=0:1:2"]
)
def test_ranges_are_two_increasing_numbers(text: str) -> None:
    with pytest.raises(UserError, match="expected NAME=MIN:MAX.*NAME=raw"):
        parse_ranges("--reward-range", [text])


def test_raw_scores_are_log_odds_as_they_are(mix: Mix, two: Path) -> None:
    resolved = mix(reward=["taste"], reward_range=["taste=raw"]).preferences(scored(two))
    expected = [s(meta.scores["taste"][0] - meta.scores["taste"][1]) for meta in scored(two)]
    np.testing.assert_allclose(resolved, expected, rtol=1e-12)


def test_win_rates_of_log_odds_by_hand(mix: Mix, two: Path, tmp_path: Path) -> None:
    """Log-odds 2, 1, 0 of a prompt's three images: R = 0.80593, 0.5, 0.19407. Pairs 0 and 5 hold them."""
    metas = scored(two)
    scores = {name: np.array([meta.scores[name] for meta in metas]) for name in NAMES}
    scores["taste"][[0, 5]] = [[2, 1], [0, 2]]
    images = [(f"{row}-0", f"{row}-1") for row in range(6)]
    images[5] = ("5-0", "0-0")
    folder = table(tmp_path / "scores", two, scores=scores, images=images)
    resolved = mix(preference="winrate", scores=folder, reward=["taste"], reward_range=["taste=raw"]).preferences(metas)
    np.testing.assert_allclose(2 * resolved[[0, 5]] - 1, [0.80593 - 0.5, 0.19407 - 0.80593], atol=1e-5)


def test_ranges_are_given_once() -> None:
    assert parse_ranges("--reward-range", ["a=-1:2.5", "b=0:1e-3"]) == {"a": (-1.0, 2.5), "b": (0.0, 0.001)}
    with pytest.raises(UserError, match="a is given twice"):
        parse_ranges("--reward-range", ["a=0:1", "a=raw"])


def test_from_calibrate_to_a_trained_model(
    train: Train, two: Path, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = train("run", on=two, preference="mixture", calibration=calibration, max_steps=2)
    written = json.loads((out / "training.json").read_text())
    rewards = json.loads(calibration.read_text())["rewards"]
    for name in NAMES:
        assert written["rewards"][name]["scale"] == rewards[name]["tau"]
        assert written["rewards"][name]["weight"] == pytest.approx(rewards[name]["weight"])
    assert written["settings"]["preference"] == "mixture"
    # The path of the calibration may change, but not its content or the mix.
    moved = tmp_path / "moved.json"
    moved.write_text(calibration.read_text())
    train("run", on=two, preference="mixture", calibration=moved, max_steps=2)
    assert "nothing to do" in capsys.readouterr().out
    value = json.loads(calibration.read_text())
    value["rewards"]["taste"]["tau"] *= 2
    moved.write_text(json.dumps(value))
    for options in ({"preference": "mixture", "calibration": moved}, {"reward": list(NAMES)}):
        assert run_cli(monkeypatch, arguments(two, model, out, max_steps=2, **options)) == 2
    error = capsys.readouterr().err
    assert "other settings (calibration.taste" in error
    assert "preference: mixture there, minmax here" in error


def test_a_continued_run_keeps_its_range(
    train: Train, shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = train("run", reward_range=["taste=0:2"], max_steps=1)
    assert run_cli(monkeypatch, arguments(shards, model, out, max_steps=1)) == 2
    assert "reward_range.taste: [0.0, 2.0] there, None here" in capsys.readouterr().err


def test_labels_need_no_mix(train: Train, calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(objective="dpo", calibration=calibration, max_steps=1)
    said = capsys.readouterr().out
    assert "--objective dpo" in said
    assert "--calibration" in said
