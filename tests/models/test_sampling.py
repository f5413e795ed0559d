"""What is watched while a pipeline samples, for each form in which pipelines keep latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smpo_models.loading import load_family
from smpo_models.sampling import load_pipeline, sample
from tests.models.test_flow_families import MODELS as FLOW_MODELS
from tests.models.test_flow_families import SHAPE
from tests.tiny import make_tiny_model

MODELS: dict[str, Callable[[Path], Path]] = {"sd15": make_tiny_model, **FLOW_MODELS}


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_watched_latents_are_the_pipelines(kind: str, tmp_path: Path) -> None:
    folder = str(MODELS[kind](tmp_path / "model"))
    family = load_family(folder, ())
    pipeline = load_pipeline(folder, folder, {}, dtype=torch.float32, variant=None)
    shape = family.latent_shape(*SHAPE)
    noise_BChw = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    seen: dict[int, torch.Tensor] = {}
    options = {"steps": 3, "guidance_scale": family.usual_guidance}
    with torch.inference_mode():
        latents_BChw = sample(
            pipeline,
            family,
            ["a cat", "a dog"],
            noise_BChw,
            **options,
            output_type="latent",
            watch=lambda step, x_BChw: seen.update({step: x_BChw.clone()}),
        )
    assert list(seen) == [0, 1, 2]
    assert seen[0].shape == (2, *shape)
    # FLUX.2's pipeline gives them in the VAE's scale, from which they are normalised again.
    torch.testing.assert_close(seen[2], latents_BChw, atol=1e-6, rtol=1e-5)
    # Nothing is left behind.
    assert "step" not in vars(pipeline.scheduler)
