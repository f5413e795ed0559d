"""The formulas against the inverter's forwards and the shard writer's bytes."""

from __future__ import annotations

import dataclasses

import pytest

from smpo_models.loading import load_family
from smpo_pipeline.inversion.batch import draw_trajectory
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.planning.rate import batches_of_units, measure_rate
from smpo_pipeline.planning.size import forwards, num_shards, pairs_that_fit, total_bytes, trajectory_bytes
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.writer import ShardWriter
from tests.inversion.helpers import make_pair
from tests.tiny.stable_diffusion import IMAGE_SIDE, LATENT_SHAPE, make_tiny_model


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family(str(make_tiny_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_family(str(make_tiny_model(tmp_path_factory.mktemp("model"), seed=1))).denoiser


PAIRS = [make_pair(number, measured=False) for number in range(5)]

SETTINGS = [
    {},
    {"solver": "ddim"},
    {"renoise_steps": 3},
    {"renoise_steps": 0, "states": 2},
    {"guidance_scale": 2.0},
    {"start": 500},
    {"start": "level0", "eta": 0.1},
    {"source": "forward", "states": 1},
    {"source": "truncated", "truncated_steps": 3},
    {"source": "truncated", "truncated_steps": 3, "guidance_scale": 2.0},
    {"guidance_scale": 0.0},
    {"timesteps": "grid"},
    {"timesteps": "published", "steps": 6},
    {"timesteps": "published", "steps": 6, "guidance_scale": 2.0},
]


def count(family, inverting_denoiser, settings) -> int:
    """Count the images that pass through the denoisers for one batch of all pairs."""
    inverter = Inverter(family, inverting_denoiser, settings, 0)
    batches = iter([[(pair, 0) for pair in PAIRS]])
    return measure_rate(inverter.invert, {family.denoiser, inverting_denoiser}, batches, 0, "cpu").forwards


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_forwards_equal_those_of_the_inverter(family, other, changes, own):
    settings = InversionSettings(**{"steps": 4, **changes})
    trajectories = [draw_trajectory(pair, 0, family, settings, 0) for pair in PAIRS]
    expected = sum(2 * forwards(trajectory.plan, settings, own_inverting_denoiser=own) for trajectory in trajectories)
    assert count(family, family.denoiser if own else other, settings) == expected


def test_forwards_by_hand(family):
    trajectory = draw_trajectory(PAIRS[0], 0, family, InversionSettings(), 0)
    assert forwards(trajectory.plan, InversionSettings(), own_inverting_denoiser=True) == 9 * 2 + 9
    assert forwards(trajectory.plan, InversionSettings(renoise_steps=5), own_inverting_denoiser=False) == 9 * 6 + 9 + 9
    assert forwards(trajectory.plan, InversionSettings(solver="anderson"), own_inverting_denoiser=True) is None


@pytest.mark.parametrize(
    "changes", [{}, {"states": 2, "trajectories": 2}, {"timesteps": "published"}, {"storage": "bfloat16"}], ids=str
)
def test_bytes_equal_those_written(family, tmp_path, changes):
    settings = InversionSettings(**{"steps": 4, "source": "forward", **changes})
    long = dataclasses.replace(PAIRS[1], pair_id="long", prompt="Zürich " * 200, scores={})
    pairs = [*PAIRS, long]
    requests = [(pair, number) for pair in pairs for number in range(settings.trajectories)]
    samples, _ = Inverter(family, family.denoiser, settings, 3).invert(requests)
    with ShardWriter(tmp_path / "shard.tar") as shard:
        for number, sample in enumerate(samples):
            shard.write(f"{number:010d}", sample)
    total = sum(
        trajectory_bytes(draw_trajectory(*request, family, settings, 3), LATENT_SHAPE, settings.storage)
        for request in requests
    )
    assert total_bytes(len(pairs), len(pairs), total / len(pairs)) == shard.entry.bytes


@pytest.mark.parametrize("changes", [{}, {"states": 2, "trajectories": 2, "storage": "bfloat16"}], ids=str)
def test_a_tar_of_the_pairs_that_fit_has_about_the_requested_size(family, tmp_path, changes):
    settings = InversionSettings(**{"steps": 4, "source": "forward", **changes})
    count = pairs_that_fit(200_000, family.latent_shape(IMAGE_SIDE, IMAGE_SIDE), settings, family.noise_schedule)
    requests = [
        (dataclasses.replace(PAIRS[0], pair_id=str(number)), trajectory)
        for number in range(count)
        for trajectory in range(settings.trajectories)
    ]
    samples, _ = Inverter(family, family.denoiser, settings, 3).invert(requests)
    with ShardWriter(tmp_path / "shard.tar") as shard:
        for number, sample in enumerate(samples):
            shard.write(f"{number:010d}", sample)
    assert 190_000 < shard.entry.bytes < 210_000
    assert pairs_that_fit(1, family.latent_shape(IMAGE_SIDE, IMAGE_SIDE), settings, family.noise_schedule) == 1


def test_shards_and_their_padding_by_hand():
    assert [num_shards(pairs, 128) for pairs in (1, 128, 129, 1_000_000)] == [1, 1, 2, 7813]
    # 3 pairs of 5000 bytes and 1024 at the end: two records of 10240; the last pair alone: one.
    assert total_bytes(7, 3, 5000.0) == 2 * 20480 + 10240


def test_a_batch_longer_than_the_time_is_measured_alone(family):
    now = iter(range(100))
    inverter = Inverter(family, family.denoiser, InversionSettings(source="forward", steps=2), 0)
    rate = measure_rate(
        inverter.invert, [family.denoiser], batches_of_units(PAIRS, 1, 2, 2), 1, "cpu", clock=lambda: next(now)
    )
    assert (rate.trajectories, rate.seconds, rate.warm) == (2, 1, False)
    assert rate.forwards == 2 * 2 * 2


def test_the_warm_up_is_excluded(family):
    # Seconds at: start, after the warm-up, begin, then after each batch the check, and the end.
    times = iter([0, 10, 10, 13, 16, 21, 21])
    inverter = Inverter(family, family.denoiser, InversionSettings(source="forward", steps=2), 0)
    rate = measure_rate(
        inverter.invert, [family.denoiser], batches_of_units(PAIRS, 1, 3, 3), 20, "cpu", clock=lambda: next(times)
    )
    assert (rate.trajectories, rate.seconds, rate.warm) == (9, 11, True)
    assert rate.forwards == 9 * 2 * 2


@pytest.mark.parametrize("seconds", [0, 20])
def test_peak_memory_excludes_earlier_trials(family, monkeypatch, seconds):
    """A simulated GPU: 7 GB peak of an earlier trial, 2 GB per batch after it."""
    counter = {"peak": 7}
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: counter.update(peak=0))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: counter["peak"])
    inverter = Inverter(family, family.denoiser, InversionSettings(source="forward", steps=1), 0)
    invert = inverter.invert

    def on_gpu(requests):
        counter["peak"] = max(counter["peak"], 2)
        return invert(requests)

    inverter.invert = on_gpu
    times = iter(range(0, 1000, 5))
    for device, peak in (("cuda", 2), ("cpu", None)):
        rate = measure_rate(
            inverter.invert, [], batches_of_units(PAIRS, 1, 1, 1), seconds, device, clock=lambda: next(times)
        )
        assert (rate.warm, rate.peak_memory) == (seconds > 0, peak)


def test_batches_are_cut_by_unit():
    """As in `invert`: one unit at a time, each batch of one image size, each trajectory once."""
    shapes = [(32, 32), (24, 40), (32, 32), (32, 32), (40, 24), (24, 40), (32, 32)]
    pairs = [make_pair(number, shape=shape) for number, shape in enumerate(shapes)]
    stream = batches_of_units(pairs, 2, 7, 3)
    units = [[next(stream) for _ in range(6)] for _ in range(20)]
    for turn, unit in enumerate(units):
        assert all(len({pair.image_size for pair, _ in batch}) == 1 for batch in unit)
        # From 8, 4 and 2 trajectories of the three sizes.
        assert sorted(map(len, unit)) == [1, 2, 2, 3, 3, 3]
        made = sorted((pair.pair_id, trajectory) for batch in unit for pair, trajectory in batch)
        assert made == sorted((pair.pair_id, 2 * turn + trajectory) for pair in pairs for trajectory in (0, 1))
    assert len({tuple(map(len, unit)) for unit in units}) > 3, "always in the same order"
    # The next unit continues where the last one ended in the sample.
    small = batches_of_units(pairs[:3], 1, 2, 9)
    first, second, third = ([(pair.pair_id, trajectory) for pair, trajectory in next(small)] for _ in range(3))
    assert sorted(first + second) == [("pair-0", 0), ("pair-1", 0)]
    assert third == [("pair-2", 0), ("pair-0", 1)]
