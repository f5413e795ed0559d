"""``--source truncated``: the model's own estimates of x0, and states noised again from where they were made."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from smpo_common.errors import UserError
from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.loading import load_family
from smpo_models.noise_schedules.rectified_flow import RectifiedFlow
from smpo_models.noise_schedules.variance_preserving import VariancePreserving
from smpo_pipeline.inversion.sources.truncated import estimates, noised_again
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion import test_flow, worlds
from tests.inversion.helpers import FlowOracle, make_pair
from tests.inversion.worlds import SEED, make_world
from tests.tiny.families import FLOW_FAMILIES

CASES = [
    ("epsilon", {}),
    ("epsilon", {"guidance_scale": 2.5, "prompt_dropout": 0.0}),
    ("v_prediction", {"guidance_scale": 1.0, "prompt_dropout": 0.0, "truncated_from": "noise"}),
    ("sample", {"guidance_scale": 2.5, "prompt_dropout": 0.0}),
    ("flow", {"guidance_scale": 2.5, "prompt_dropout": 0.0}),
    ("flow", {"truncated_from": "noise"}),
]
SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    if request.param == "flow":
        folder = FLOW_FAMILIES["sd35"](tmp_path_factory.mktemp("model"), seed=3)
        return load_family(str(folder)), FlowOracle(folder), test_flow
    return *make_world(tmp_path_factory, "sd", request.param), worlds


def settings_of(**more) -> InversionSettings:
    return InversionSettings(**{"source": "truncated", "steps": 6, "truncated_steps": 2, "states": 2, **more})


def plan_of(family, settings: InversionSettings, pair_id: str):
    return plan_trajectory(settings, family.noise_schedule, SEED, pair_id, 0, tokens=family.num_tokens(32, 32))


def draw(pair_id: str, purpose: str, count: int = 1) -> list[torch.Tensor]:
    stream = trajectory_stream(SEED, pair_id, 0, purpose)
    return [gaussian(stream, (2, *SHAPE[1:])).double() for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "more"), CASES, indirect=["world"], ids=str)
def test_every_stored_tensor_equals_a_float64_computation(world, more) -> None:
    """From the formulas: guided steps down, the estimate of x0, and x_s out of x_t by fresh noise."""
    family, oracle, checks = world
    settings, pairs = settings_of(**more), [make_pair(1)]
    samples, _ = checks.invert(family, settings, pairs)
    whole_x0, _ = checks.invert(family, InversionSettings(source="forward", steps=1, states=1), pairs)
    for sample, pair, encoded in zip(samples, pairs, whole_x0, strict=True):
        path = plan_of(family, settings, pair.pair_id).sampled_at
        assert sample.meta.flipped == encoded.meta.flipped
        assert sample.residual_K2.isnan().all()
        text, empty = oracle.embed("" if sample.meta.prompt_dropped else pair.prompt), oracle.embed("")
        (start,), fresh = draw(pair.pair_id, "truncated/noise"), draw(pair.pair_id, "truncated/noise again", 2)

        def guided(x: torch.Tensor, t: float, text=text, empty=empty) -> torch.Tensor:
            """The noise of a diffusion model, the velocity of a flow model."""
            ask = oracle.output if isinstance(oracle, FlowOracle) else oracle.noise
            unconditional = ask(x, t, empty)
            return unconditional + settings.guidance_scale * (ask(x, t, text) - unconditional)

        for image in range(2):
            x0, x = encoded.x0_2Chw[image].double(), start[image]
            if settings.truncated_from == "image":
                x = oracle.a(path[0]) * x0 + oracle.s(path[0]) * start[image]
            for t, lower in itertools.pairwise(path):
                x = oracle.carry(x, guided(x, t), t, lower)
            t, at = path[-1], guided(x, path[-1])
            estimate = x - oracle.s(t) * at
            estimate = estimate if isinstance(oracle, FlowOracle) else estimate / oracle.a(t)
            # Float32's errors, divided by a_t.
            torch.testing.assert_close(sample.x0_2Chw[image].double(), estimate, rtol=2**-10, atol=2e-5)
            for k, s in enumerate(sample.timestep_K.tolist()):
                assert s > t
                growth = oracle.a(s) / oracle.a(t)
                spread = (oracle.s(s) ** 2 - (oracle.s(t) * growth) ** 2) ** 0.5
                x_s = growth * x + spread * fresh[k][image]
                stored_x0 = sample.x0_2Chw[image].double()
                # tau is that of the estimate before it was rounded.
                x_s = x_s + oracle.a(s) * (stored_x0 - estimate)
                checks.check_state(oracle, sample, k, image, text, x_s)


def sd15() -> VariancePreserving:
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return VariancePreserving(DDIMScheduler(**options, clip_sample=False))


def flow() -> RectifiedFlow:
    return RectifiedFlow(FlowMatchEulerDiscreteScheduler(shift=3.0), sampler_steps=28)


class Rows:
    """What :func:`estimates` needs of a batch of one trajectory, in float64, under a denoiser given as a function."""

    def __init__(self, schedule, path, noise_of) -> None:
        self.noise_schedule, self.path, self.noise_of = schedule, path, noise_of
        self.settings, self.device = settings_of(), "cpu"
        self.x0_RChw = torch.randn(2, *SHAPE[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.stream = lambda purpose: trajectory_stream(SEED, "pair", 0, purpose)
        self.trajectories = [SimpleNamespace(stream=self.stream)]
        self.start = gaussian(self.stream("truncated/noise"), (2, *SHAPE[1:])).double()

    def sampled_at(self):
        return [torch.full((2,), t, dtype=self.noise_schedule.timestep_dtype) for t in self.path]

    def levels(self, t: float) -> tuple[float, float]:
        a, s = self.noise_schedule.levels(torch.tensor([t], dtype=self.noise_schedule.timestep_dtype), self.x0_RChw)
        return a.item(), s.item()

    def predicted(self, x: torch.Tensor, t_R: torch.Tensor, _rows) -> torch.Tensor:
        a, s = self.levels(t_R[0].item())
        noise = self.noise_of(x, a, s)
        return noise if self.noise_schedule.prediction_type == "epsilon" else noise - (x - s * noise) / a


@pytest.mark.parametrize(("schedule", "path"), [(sd15(), (961, 801, 481, 441)), (flow(), (900.0, 700.0, 300.0, 7.5))])
def test_gaussian_data_in_closed_form(schedule, path) -> None:
    """The ideal denoiser of N(m, v I): each step scales x_t - a_t m, and x0 is the posterior mean."""
    m, v = 0.7, 2.3
    rows = Rows(schedule, path, lambda x, a, s: s * (x - a * m) / (a**2 * v + s**2))
    a, s = rows.levels(path[0])
    centred = a * rows.x0_RChw + s * rows.start - a * m
    for t, lower in itertools.pairwise(path):
        (a, s), (a_low, s_low) = rows.levels(t), rows.levels(lower)
        centred = centred * (a * a_low * v + s * s_low) / (a**2 * v + s**2)
    a, s = rows.levels(path[-1])
    t, x0, noise = estimates(rows)
    assert t.tolist() == [path[-1]] * 2
    torch.testing.assert_close(x0, m + a * v * centred / (a**2 * v + s**2), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(noise, s * centred / (a**2 * v + s**2), rtol=1e-10, atol=1e-12)


def test_a_denoiser_that_sees_no_noise_scales_the_start() -> None:
    rows = Rows(sd15(), (681, 641, 601), lambda x, _a, _s: torch.zeros_like(x))
    a, s = rows.levels(681)
    torch.testing.assert_close(estimates(rows)[1], rows.x0_RChw + s / a * rows.start, rtol=1e-12, atol=0)


def test_without_steps_or_noise_it_is_forward_noising_of_each_image_by_its_own_noise() -> None:
    """At sigma = 1e-9 the estimate is x0 itself, and tau the fresh noise."""
    rows = Rows(flow(), (1e-6,), lambda x, _a, _s: x)
    t, x0, noise = estimates(rows)
    torch.testing.assert_close(x0, rows.x0_RChw, rtol=0, atol=1e-8)
    fresh, s = gaussian(rows.stream("again"), noise.shape).double(), torch.tensor([500.0, 20.0])
    torch.testing.assert_close(noised_again(rows.noise_schedule, noise, fresh, t, s), fresh, rtol=0, atol=1e-6)


def test_noise_again_by_hand() -> None:
    """r = a_s s_t / (a_t s_s) is 0.71948 from 401 to 501 of SD 1.5, and 1 from a timestep to itself."""
    schedule, one, zero = sd15(), torch.ones(3, 1, 1, 1, dtype=torch.float64), torch.zeros(3, 1, 1, 1).double()
    t, s = torch.tensor([401, 401, 7]), torch.tensor([501, 401, 999])
    kept, fresh = (noised_again(schedule, *noises, t, s).flatten() for noises in ((one, zero), (zero, one)))
    assert kept[0].item() == pytest.approx(0.71948, abs=5e-6)
    assert (kept[1].item(), fresh[1].item()) == pytest.approx((1, 0), abs=1e-7)
    torch.testing.assert_close(kept**2 + fresh**2, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_where_it_begins_and_which_timesteps_it_stores() -> None:
    """Each node with room for the steps below it is as likely; timesteps are uniform above where it is left."""
    settings = InversionSettings(source="truncated")
    assert (settings.steps, settings.truncated_steps, settings.guidance_scale, settings.states) == (25, 5, 0, 9)
    plans = [plan_trajectory(settings, sd15(), 0, str(number), 0, tokens=64) for number in range(500)]
    grid = [1 + 40 * number for number in range(25)]
    starts = Counter(plan.sampled_at[0] for plan in plans)
    assert set(starts) == set(grid[5:])
    assert all(count == pytest.approx(25, abs=20) for count in starts.values())  # 4 standard deviations
    for plan in plans:
        first = grid.index(plan.sampled_at[0])
        assert list(plan.sampled_at) == grid[first - 5 : first + 1][::-1]
        assert plan.sampled_at[-1] < plan.nodes[0]
        assert list(plan.nodes) == sorted(set(plan.nodes))
        assert (plan.nodes[-1] <= 999, len(plan.nodes)) == (True, 9)
        assert (plan.used_at, plan.stored) == (plan.nodes, tuple(range(9)))
    shares = torch.tensor(
        [(t - plan.sampled_at[-1]) / (999 - plan.sampled_at[-1]) for plan in plans for t in plan.nodes]
    )
    assert shares.mean().item() == pytest.approx(0.5, abs=0.018)
    assert shares.quantile(0.25).item() == pytest.approx(0.25, abs=0.03)


def test_flow_models_draw_in_their_samplers_clock() -> None:
    """sigma = 3 u / (1 + 2 u), u uniform above that of t; the sampler's grid begins at pure noise."""
    settings, clock = settings_of(truncated_from="noise", steps=10, truncated_steps=3, states=5), []
    for number in range(100):
        plan = plan_trajectory(settings, flow(), 0, str(number), 0, tokens=64)
        assert plan.sampled_at[0] == 1000
        sigmas = torch.tensor([plan.sampled_at[-1], *plan.nodes], dtype=torch.float64) / 1000
        assert sigmas[-1] < 1
        low, *times = (sigmas / (3 - 2 * sigmas)).tolist()
        clock += [(u - low) / (1 - low) for u in times]
    assert min(clock) > 0
    assert sum(clock) / len(clock) == pytest.approx(0.5, abs=0.052)


@pytest.mark.parametrize(
    ("more", "schedule"),
    [
        ({"truncated_steps": 6}, sd15()),
        ({"truncated_steps": 6}, flow()),
        ({"states": 600, "truncated_from": "noise"}, sd15()),
    ],
)
def test_too_few_timesteps_are_one_line(more, schedule) -> None:
    with pytest.raises(UserError, match="--truncated-steps .: of a sampler of --steps 6 there is no place to begin"):
        plan_trajectory(settings_of(**more), schedule, 0, "pair", 0, tokens=64)
