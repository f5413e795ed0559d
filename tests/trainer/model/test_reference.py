"""Reference errors: stored ones in another precision, and recomputed ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from smpo_models.loading import load_family
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.reader import ShardDirectory
from smpo_schemas.shards.stored_state import StoredState
from smpo_trainer.data import loader as batches
from smpo_trainer.model import reference
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl
from tests.trainer.conftest import Train
from tests.trainer.helpers import metrics, write_shards


def inverted(folder: Path, model: Path, dtype: str) -> Path:
    """Shards of 24 states as ``invert --dtype`` makes them, all under one prompt.

    With several prompts, encodings would differ by a bf16 step if they are batched differently.
    """
    family = load_family(str(model))
    inverter = Inverter(family, family.denoiser, InversionSettings(dtype=dtype, steps=6, prompt_dropout=0), seed=0)
    samples, _ = inverter.invert([(replace(make_pair(number), prompt="a cat"), 0) for number in range(4)])
    folder.mkdir()
    write_shards(folder, model, samples, ["clipscore"], dtype=dtype)
    return folder


@pytest.fixture(scope="module", params=[make_tiny_model, make_tiny_xl], ids=["sd", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose norms have gains other than 1, like trained ones, so that rounding changes them."""
    folder: Path = request.param(tmp_path_factory.mktemp("models") / "model")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def bf16_shards(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inverted(tmp_path_factory.mktemp("bf16") / "shards", base, "bf16")


@pytest.mark.slow
def test_bf16_shards_hold_the_errors_that_a_bf16_run_computes(
    train: Train, base: Path, bf16_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal bits, except where the position in a batch changes the last bit before rounding."""
    computed: list[torch.Tensor] = []
    monkeypatch.setattr(reference, "write_reference", lambda _path, error_S2, _steps: computed.append(error_S2))
    options = {"base": base, "max_steps": 3, "batch_size": 8, "dtype": "bf16"}
    out = train(on=bf16_shards, reference="recomputed", **options)
    stored_S2 = torch.cat([sample.ref_error_K2 for sample in ShardDirectory(bf16_shards).samples()])
    assert (computed[0] == stored_S2).float().mean() > 0.75
    assert metrics(out)[0]["reference_noise/std"] < 0.2


@pytest.mark.slow
def test_errors_of_another_precision_are_named_and_significant(
    train: Train, base: Path, bf16_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"base": base, "max_steps": 1, "batch_size": 24, "dtype": "bf16", "reference": "stored"}
    words = ("reference errors were computed in fp32", "this run computes in bf16 autocast")
    train("same", on=bf16_shards, **options)
    assert words[0] not in capsys.readouterr().out
    out = train("other", on=inverted(tmp_path / "fp32", base, "fp32"), **options)
    assert metrics(out)[0]["reference_noise/std"] > 0.05
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "beta", "significant"), [(3e-5, 2000, False), (1e-4, 2000, True), (1e-4, "auto:1", True)]
)
def test_whether_noise_is_significant_does_not_depend_on_the_size_of_a_step(
    train: Train,
    tmp_path: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    beta: object,
    significant: bool,
) -> None:
    """Margins of std 0.04 or 0.14; the mean loss of few states moves by more than 0.005 with either.

    A beta that begins at 1 may rise to the published one, 2000.
    """
    read = batches.read_state

    def noisy(*where: object) -> StoredState:
        state = read(*where)
        stream = torch.Generator().manual_seed(int(state.ref_error_2.sum() * 1e6))
        return replace(state, ref_error_2=state.ref_error_2 + noise * torch.randn(2, generator=stream))

    monkeypatch.setattr(batches, "read_state", noisy)
    made: list[bool] = []
    monkeypatch.setattr(reference, "write_reference", lambda *_: made.append(True))
    for batch_size in (1, 18):
        train(f"{batch_size}", batch_size=batch_size, max_steps=18 // batch_size, beta=beta)
    assert len(made) == 2 * significant


def test_recomputed_errors_that_are_not_finite_end_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    computed = reference.reference_errors
    monkeypatch.setattr(reference, "reference_errors", lambda *args: computed(*args) * torch.inf)
    with pytest.raises(AssertionError):
        train(reference="recomputed")
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "errors are not finite in this run; use a wider --dtype" in error
