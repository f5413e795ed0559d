"""Tiny models beside their float64 versions, and the comparison of what the inverter stores with these."""

from __future__ import annotations

import pytest
import torch

from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.loading import load_family
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.samples import Sample
from tests.inversion.helpers import Oracle, OracleXL, PixArtOracle
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_xl
from tests.tiny.transformers import make_tiny_pixart

SEED = 5


FAMILIES = {
    "sd": (make_tiny_model, Oracle),
    "sdxl": (make_tiny_xl, OracleXL),
    "pixart": (lambda folder, _prediction_type, seed: make_tiny_pixart(folder, seed), PixArtOracle),
}


def make_world(tmp_path_factory, name: str, prediction_type: str):
    make, oracle = FAMILIES[name]
    folder = make(tmp_path_factory.mktemp("model"), prediction_type, seed=3)
    return load_family(str(folder)), oracle(folder, prediction_type)


def invert(family, settings: InversionSettings, pairs, batch_size: int = 4, seed: int = SEED, inverting_denoiser=None):
    inverter = Inverter(family, inverting_denoiser or family.denoiser, settings, seed)
    requests = [(pair, trajectory) for pair in pairs for trajectory in range(settings.trajectories)]
    samples: list[Sample] = []
    health = None
    for start in range(0, len(requests), batch_size):
        made, sums = inverter.invert(requests[start : start + batch_size])
        samples += made
        if health is None:
            health = sums
        else:
            health += sums
    assert all(isinstance(sample, Sample) for sample in samples)
    return samples, health


def all_nodes(family, settings: InversionSettings, pair_id: str, trajectory: int = 0) -> list[int]:
    """Of a trajectory, whatever is stored of it."""
    return list(plan_trajectory(settings, family.noise_schedule, SEED, pair_id, trajectory, tokens=64).nodes)


def expected_x0(oracle: Oracle, sample: Sample, pair, mode: bool) -> torch.Tensor:
    """The VAE's posterior sample, by diffusers alone and the pair's own draw."""
    pixels = torch.from_numpy(pair.pixels_2HW3.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    if sample.meta.flipped:
        pixels = pixels.flip(-1)
    with torch.no_grad():
        posterior = oracle.vae.encode(pixels).latent_dist
    noise = gaussian(trajectory_stream(SEED, pair.pair_id, sample.meta.trajectory, "vae"), tuple(posterior.mean.shape))
    latents = posterior.mean if mode else posterior.mean + posterior.std * noise
    return latents * oracle.vae.config.scaling_factor


def check_state(
    oracle: Oracle, sample: Sample, k: int, image: int, text: torch.Tensor, x_t: torch.Tensor, rounding: float = 2**-10
) -> None:
    """tau to the rounding (default: float16's) of the float64 state; ref_error and ref_norm at the stored state."""
    t = int(sample.timestep_K[k])
    x0 = sample.x0_2Chw[image].double()
    tau = (x_t - oracle.a(t) * x0) / oracle.s(t)
    stored = sample.noise_K2Chw[k, image].double()
    torch.testing.assert_close(stored, tau, rtol=rounding, atol=3e-4)
    rebuilt = oracle.a(t) * x0 + oracle.s(t) * stored
    output = oracle.output(rebuilt, t, text)
    error = (output - oracle.target(x0, stored, t)).square().mean()
    assert float(sample.ref_error_K2[k, image]) == pytest.approx(float(error), rel=1e-4)
    assert float(sample.ref_norm_K2[k, image]) == pytest.approx(float(output.square().mean().sqrt()), rel=1e-4)
