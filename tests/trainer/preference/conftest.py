from __future__ import annotations

from pathlib import Path

import pytest

from smpo_trainer.preference.reward_mix import RewardMix, resolve_mix
from smpo_trainer.shards.shard_set import open_shards
from tests.calibration.helpers import populations, write_scores
from tests.command import run_command
from tests.trainer.helpers import arguments, make_shards, resolve_settings
from tests.trainer.preference.test_reward_mix import NAMES, Mix


@pytest.fixture(scope="module")
def two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 6 pairs with two rewards."""
    return make_shards(tmp_path_factory.mktemp("shards") / "two", model, num_states=2, rewards=NAMES)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of ``smpo-pipeline calibrate`` for the rewards of the shards."""
    resolved, _, labels, prompts = populations(400)
    scores = dict(zip(NAMES, resolved.values(), strict=True))
    folder = write_scores(tmp_path_factory.mktemp("calibration") / "scores", scores, labels, prompts)
    done = run_command("smpo-pipeline", "calibrate", "--scores", folder)
    assert done.returncode == 0, done.stderr
    return folder / "calibration.json"


@pytest.fixture
def mix(two: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """Resolve the mix of these flags; ``said`` collects printed lines."""

    def resolve(on: Path = two, said: list[str] | None = None, **options: object) -> RewardMix:
        settings = resolve_settings(monkeypatch, arguments(on, model, tmp_path / "out", **options))
        resolved = open_shards([str(on)], tmp_path / "cache")
        return resolve_mix(settings.rewards, settings.preset, resolved, (said if said is not None else []).append)

    return resolve
