"""The memory account of an inversion against the tensors of a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from smpo_models.loading import load_family
from smpo_models.memory_account.inversion import InversionRun, account_inversion
from smpo_models.memory_account.live import LiveTensors
from smpo_pipeline.inversion.inverter import Inverter
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import make_tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
def test_an_inversion_holds_what_the_account_says(tmp_path: Path, side: int) -> None:
    model = make_tiny_model(tmp_path / "model")
    family = load_family(str(model))
    weights = sum(
        weight.numel() for part in (family.denoiser, family.vae, *family.text_modules) for weight in part.parameters()
    )
    inverter = Inverter(family, family.denoiser, InversionSettings(dtype="fp32", steps=2), seed=0)
    pairs = [(make_pair(number, side=side), 0) for number in range(4)]
    with LiveTensors() as live:
        inverter.invert(pairs)
    run = InversionRun(side, side, batch_size=4, dtype="fp32", holds_text=True)
    memory = account_inversion(load_family(str(model), ("text", "vae"), device="meta"), run)
    assert memory.weights + memory.vae + memory.text_encoders == pytest.approx(4 * weights, rel=0.02)
    assert live.peak == pytest.approx(max(memory.encoding, memory.denoising), rel=0.1)
