"""``--source forward``: images noised by drawn noise."""

from __future__ import annotations

import pytest
import torch

from smpo_models.draws import gaussian, trajectory_stream
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import make_pair
from tests.inversion.worlds import SEED, all_nodes, check_state, invert


@pytest.mark.slow
def test_forward_source_gives_both_images_the_same_noise_at_the_same_timesteps(epsilon_world):
    family, oracle = epsilon_world
    pairs = [make_pair(number) for number in range(3)]
    samples, health = invert(family, InversionSettings(source="forward"), pairs)
    inverted, _ = invert(family, InversionSettings(), pairs)
    for sample, other in zip(samples, inverted, strict=True):
        assert torch.equal(sample.timestep_K, other.timestep_K)
        assert torch.equal(sample.x0_2Chw, other.x0_2Chw)
        assert torch.equal(sample.noise_K2Chw[:, 0], sample.noise_K2Chw[:, 1])
        assert sample.residual_K2.isnan().all()
        text = oracle.embed("" if sample.meta.prompt_dropped else sample.meta.prompt)
        for k, t in enumerate(sample.timestep_K.tolist()):
            stored = sample.noise_K2Chw[k, 0].double()
            check_state(oracle, sample, k, 0, text, oracle.a(t) * sample.x0_2Chw[0].double() + oracle.s(t) * stored)
    everything = torch.cat([sample.noise_K2Chw.float().flatten() for sample in samples])
    assert abs(float(everything.mean())) < 0.03
    assert float(everything.std()) == pytest.approx(1, abs=0.03)
    assert all(band.noise_ratio == 1 for band in health.bands(1000) if band.states)


@pytest.mark.parametrize(("forward_noise", "purpose"), [("pair", "forward"), ("image", "forward/image")])
def test_forward_noise_is_drawn_for_the_pair_or_for_each_image(some_world, forward_noise, purpose):
    """Each state by hand: one draw a node (and one for the start), of the trajectory's own stream."""
    family, oracle = some_world
    pairs = [make_pair(number) for number in range(3)]
    settings = InversionSettings(source="forward", forward_noise=forward_noise, steps=3, states=2)
    samples, _ = invert(family, settings, pairs, batch_size=2)
    for pair, sample in zip(pairs, samples, strict=True):
        stream = trajectory_stream(SEED, pair.pair_id, 0, purpose)
        nodes = all_nodes(family, settings, pair.pair_id)
        shape = (2 if forward_noise == "image" else 1, *sample.x0_2Chw.shape[1:])
        drawn = dict(
            zip((-1, *nodes), [gaussian(stream, shape).expand_as(sample.x0_2Chw) for _ in range(4)], strict=True)
        )
        text = [
            oracle.embed("" if sample.meta.prompt_dropped else pair.prompt, *told)
            for told in zip(pair.size, pair.crop, strict=True)
        ]
        for k, t in enumerate(sample.timestep_K.tolist()):
            for image in range(2):
                x_t = oracle.a(t) * sample.x0_2Chw[image].double() + oracle.s(t) * drawn[t][image].double()
                check_state(oracle, sample, k, image, text[image], x_t)
