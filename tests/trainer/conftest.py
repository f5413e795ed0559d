from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.tiny.stable_diffusion import make_tiny_model
from tests.trainer.helpers import PlainReference, arguments, make_shards, run_cli

Train = Callable[..., Path]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on the CPU, with one thread, since more slow tiny models down."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "epsilon")


@pytest.fixture(scope="session")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "v", "v_prediction")


@pytest.fixture(scope="session")
def shards(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 states of 6 pairs, one reward; labels: 1, 0, a tie, none, 1, 0."""
    return make_shards(tmp_path_factory.mktemp("shards") / "plain", model, labels=(1.0, 0.0, 0.5, None))


@pytest.fixture(scope="session")
def other_unet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The reference with slightly perturbed weights."""
    folder = tmp_path_factory.mktemp("other") / "unet"
    unet = PlainReference(model).unet
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.002 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(folder)
    return folder


@pytest.fixture
def train(shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run ``smpo-train`` on ``shards`` into a folder of this name and return it; options as in ``arguments``."""

    def run(name: str = "run", *, on: Path = shards, base: Path = model, **options: object) -> Path:
        status = run_cli(monkeypatch, arguments(on, base, tmp_path / name, **options))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert status == 0
        return tmp_path / name

    return run
