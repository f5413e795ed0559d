"""What a trajectory must not depend on, and the health of all."""

from __future__ import annotations

import pytest
import torch

from smpo_models.draws import gaussian, trajectory_stream
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.inversion.worlds import SEED, invert


@pytest.mark.slow
@pytest.mark.parametrize(
    "of",
    [{"timesteps": "jittered"}, {"timesteps": "published"}, {"source": "truncated", "truncated_steps": 2}],
    ids=str,
)
def test_results_do_not_depend_on_batch_size_or_order(some_world, of):
    family, _ = some_world
    settings = InversionSettings(**of, steps=5, trajectories=2, states=3, prompt_dropout=0.3)
    pairs = [make_pair(number) for number in range(3)]
    one, _ = invert(family, settings, pairs, batch_size=1)
    for size, order in ((4, pairs), (6, pairs[::-1])):
        other, _ = invert(family, settings, order, batch_size=size)
        by_name = {(sample.meta.pair_id, sample.meta.trajectory): sample for sample in other}
        for sample in one:
            twin = by_name[sample.meta.pair_id, sample.meta.trajectory]
            assert twin.meta == sample.meta
            for name, tensor in sample.tensors().items():
                torch.testing.assert_close(
                    twin.tensors()[name].double(), tensor.double(), rtol=2e-3, atol=5e-4, equal_nan=True
                )


@pytest.mark.slow
def test_trajectories_differ_and_are_reproducible(epsilon_world):
    family, _ = epsilon_world
    settings = InversionSettings(trajectories=2)
    first, _ = invert(family, settings, [make_pair(1)])
    again, _ = invert(family, settings, [make_pair(1)])
    assert not torch.equal(first[0].timestep_K, first[1].timestep_K)
    assert not torch.equal(first[0].x0_2Chw, first[1].x0_2Chw)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_health_is_the_ratio_of_rms_predicted_noise(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(prompt_dropout=0, steps=5)
    pairs = [make_pair(1), make_pair(3, measured=False)]
    samples, health = invert(family, settings, pairs)
    bands = health.bands(1000)
    sample = samples[0]
    text = oracle.embed(sample.meta.prompt)
    assert [band.states for band in bands] == [2] * 5
    for k, t in enumerate(sample.timestep_K.tolist()):
        at_states = at_noised = 0.0
        for image in range(2):
            x0 = sample.x0_2Chw[image].double()
            x_t = oracle.a(t) * x0 + oracle.s(t) * sample.noise_K2Chw[k, image].double()
            drawn = gaussian(trajectory_stream(SEED, "pair-1", 0, f"health/{image}/{t}"), (4, 8, 8)).double()
            at_states += float(oracle.noise(x_t, t, text).square().sum())
            at_noised += float(oracle.noise(oracle.a(t) * x0 + oracle.s(t) * drawn, t, text).square().sum())
        assert bands[t * 5 // 1000].noise_ratio == pytest.approx((at_states / at_noised) ** 0.5, rel=1e-3)
