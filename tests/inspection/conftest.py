from __future__ import annotations

from pathlib import Path

import pytest

from smpo_models.loading import load_family
from tests.inspection.helpers import make_shards
from tests.tiny.stable_diffusion import make_tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards") / "trajectories", model, load_family(str(model), ("vae",)))
