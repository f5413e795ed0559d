"""``--timesteps published`` against the loop of the published code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from smpo_models.draws import gaussian, trajectory_stream
from smpo_pipeline.inversion import timesteps as timesteps_module
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.samples import STORAGE
from tests.inversion.helpers import Oracle, make_pair
from tests.inversion.worlds import SEED, invert, make_world


def published_state(oracle: Oracle, x0, t: int, steps: int, text, eta_noise=()) -> tuple[torch.Tensor, float]:
    """The published loop, and the residual of its last step.

    The inverse scheduler's timesteps are where steps start, first one step below the grid; those below t are gone
    through. The UNet is asked there, with the state and, ReNoise, with what the step makes of it; or, InPO, once, and
    noise is added.
    """
    delta = 1000 // steps
    alphas = oracle.alphas_cumprod
    x = x0
    for number, start in enumerate(start for start in range(1 - delta, 1001 - delta, delta) if start < t):
        before, after = alphas[max(start, 0)], alphas[start + delta]

        def stepped(eps, x=x, before=before, after=after):
            return after.sqrt() * (x - (1 - before).sqrt() * eps) / before.sqrt() + (1 - after).sqrt() * eps

        eps = oracle.output(x, start, text)
        if not len(eta_noise):
            eps = (eps + oracle.output(stepped(eps), start, text)) / 2
        x = stepped(eps)
        if len(eta_noise):
            std = ((1 - before) / (1 - after) * (1 - after / before)).sqrt()
            x = x + 0.1 * std * eta_noise[number]
    return x, float((x - stepped(oracle.output(x, start, text))).norm() / x.norm())


PUBLISHED_T = (0, 1, 2, 150, 500, 801, 950, 999)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "steps"),
    [("sd", "smpo", 5), ("sd", "smpo", 10), ("sd", "inpo", 10), ("sdxl", "smpo", 5), ("sdxl", "inpo", 5)],
)
def test_published_equals_the_published_loop(tmp_path_factory, monkeypatch, name, method, steps):
    """Of diffusers 0.20.0, to 1e-5: what is stored is left unrounded here."""
    family, oracle = make_world(tmp_path_factory, name, "epsilon")
    inpo = {"renoise_steps": 0, "eta": 0.1} if method == "inpo" else {}
    settings = InversionSettings(
        timesteps="published", steps=steps, prompt_dropout=0, trajectories=len(PUBLISHED_T), **inpo
    )
    monkeypatch.setitem(STORAGE, "float16", torch.float32)
    drawn = lambda _seed, _pair, trajectory, _purpose: SimpleNamespace(integers=lambda _: PUBLISHED_T[trajectory])  # noqa: E731
    monkeypatch.setattr(timesteps_module, "trajectory_stream", drawn)
    pair = make_pair(1)
    samples, _ = invert(family, settings, [pair], batch_size=3)
    for trajectory, (sample, t) in enumerate(zip(samples, PUBLISHED_T, strict=True)):
        assert sample.timestep_K.tolist() == [t]
        stream = trajectory_stream(SEED, pair.pair_id, trajectory, "eta")
        noise = [gaussian(stream, (2, 4, 8, 8)).double() for _ in range(steps)]
        for image in range(2):
            x0, text = sample.x0_2Chw[image].double(), oracle.embed(pair.prompt, pair.size[image], pair.crop[image])
            eta_noise = [each[image] for each in noise] if inpo else ()
            x, residual = published_state(oracle, x0, t, steps, text, eta_noise)
            stored = sample.noise_K2Chw[0, image].double()
            assert (oracle.a(t) * x0 + oracle.s(t) * stored - x).norm() < 1e-5 * x.norm()
            tau = (x - oracle.a(t) * x0) / oracle.s(t)
            assert (stored - tau).norm() < 1e-5 * x.norm() / oracle.s(t)
            ref_error = (oracle.output(x, t, text) - tau).square().mean()
            assert float(sample.ref_error_K2[0, image]) == pytest.approx(float(ref_error), rel=1e-4)
            assert float(sample.residual_K2[0, image]) == pytest.approx(residual, rel=1e-3, abs=1e-5)
