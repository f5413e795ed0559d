"""Warnings about trajectories of trained models: the embedded world's own, and one with a VAE that does not fit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from smpo_models.loading import load_family
from smpo_pipeline.inversion.advice import believable, health_warnings
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.isolation import Failure
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import embedded_pair, make_pair
from tests.tiny.stable_diffusion import make_tiny_model


@pytest.mark.slow
def test_the_warning_is_silent_on_the_world_and_fires_on_latents_thinner_than_its_denoiser_knows():
    family = load_family(str(ASSETS / "model"))
    settings = InversionSettings(prompt_dropout=0, hflip=False)
    requests = [(dataclasses.replace(embedded_pair(), pair_id=name), 0) for name in ("a", "b")]

    def bands():
        samples, health = Inverter(family, family.denoiser, settings, 0).invert(requests)
        assert not any(isinstance(sample, Failure) for sample in samples)
        return health.bands(1000)

    good = bands()
    assert health_warnings(good, settings) == []
    with torch.no_grad():
        family.vae.quant_conv.bias[4:] = 2 * math.log(0.05)
    thin = bands()
    # All five bands, and a line with the remedies.
    assert len(health_warnings(thin, settings)) == 6
    assert all(band.noise_ratio < 0.7 for band in thin)


def test_steps_that_a_random_denoiser_leaves_unsolved_are_warned_of(tmp_path):
    """Its noise ratio is near 1, as that of a full-size one, and does not see it."""
    family = load_family(str(make_tiny_model(tmp_path / "model", seed=3)))
    with torch.no_grad():
        family.denoiser.conv_out.weight *= 4  # a tiny one of random weights is too smooth
    settings = InversionSettings(steps=2, prompt_dropout=0, hflip=False)
    requests = [(dataclasses.replace(make_pair(0), pair_id=f"{number}"), 0) for number in range(4)]
    _, health = Inverter(family, family.denoiser, settings, 0).invert(requests)
    bands = [band for band in health.bands(1000) if band.states]
    assert all(believable(band) for band in bands)
    warnings = health_warnings(bands, settings)
    assert any("residual" in line for line in warnings)
