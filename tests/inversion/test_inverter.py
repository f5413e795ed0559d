"""Every stored tensor, recomputed independently in float64; and what results must not depend on."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler

from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.loading import load_family
from smpo_pipeline.inversion import inverter as inverter_module
from smpo_pipeline.inversion import timesteps as timesteps_module
from smpo_pipeline.inversion.advice import health_warnings
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_pipeline.toy.create import ASSETS
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.shards.samples import STORAGE, Sample
from tests.inversion.helpers import Oracle, OracleXL, PixArtOracle, embedded_pair, make_pair
from tests.tiny import make_tiny_model, make_tiny_xl
from tests.tiny_transformers import make_tiny_pixart

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


@pytest.fixture(
    scope="module",
    params=[*((f, p) for f in ("sd", "sdxl") for p in ("epsilon", "v_prediction", "sample")), ("pixart", "epsilon")],
    ids="-".join,
)
def world(request, tmp_path_factory):
    return make_world(tmp_path_factory, *request.param)


@pytest.fixture(
    scope="module", params=[("sd", "epsilon"), ("sdxl", "v_prediction"), ("pixart", "epsilon")], ids="-".join
)
def some_world(request, tmp_path_factory):
    return make_world(tmp_path_factory, *request.param)


@pytest.fixture(scope="module")
def epsilon_world(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), "epsilon", seed=3)
    return load_family(str(folder)), Oracle(folder, "epsilon")


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
    """tau to the rounding (default: float16's) of the float64 state, ref_error at exactly the stored state."""
    t = int(sample.timestep_K[k])
    x0 = sample.x0_2Chw[image].double()
    tau = (x_t - oracle.a(t) * x0) / oracle.s(t)
    stored = sample.noise_K2Chw[k, image].double()
    torch.testing.assert_close(stored, tau, rtol=rounding, atol=3e-4)
    rebuilt = oracle.a(t) * x0 + oracle.s(t) * stored
    error = (oracle.output(rebuilt, t, text) - oracle.target(x0, stored, t)).square().mean()
    assert float(sample.ref_error_K2[k, image]) == pytest.approx(float(error), rel=1e-4)


def test_every_stored_tensor_equals_an_independent_float64_trajectory(world):
    """For every family and every prediction type."""
    check_trajectories(*world, InversionSettings())


@pytest.mark.parametrize(
    "settings",
    [
        InversionSettings(renoise_steps=0, vae_latent="mode", timesteps="grid", steps=5),
        InversionSettings(renoise_steps=3, steps=4, trajectories=2, prompt_dropout=0.5),
        InversionSettings(states=3),
    ],
    ids=["ddim-grid-mode", "renoise3-trajectories2", "some-states"],
)
def test_other_settings_too(some_world, settings):
    check_trajectories(*some_world, settings)


@pytest.mark.parametrize("shape", [(24, 40), (64, 16)], ids=str)
def test_other_shapes_too(some_world, shape):
    """As buckets have them; the model is told their own size as the target."""
    family, oracle = some_world
    oracle.target_size = shape
    check_trajectories(
        family, oracle, InversionSettings(steps=3), [make_pair(number, shape=shape) for number in range(2)]
    )
    oracle.target_size = (32, 32)


def check_trajectories(family, oracle: Oracle, settings: InversionSettings, pairs=None) -> None:
    pairs = pairs or [make_pair(number) for number in range(3)]
    samples, _ = invert(family, settings, pairs)
    assert len(samples) == len(pairs) * settings.trajectories
    for index, sample in enumerate(samples):
        pair = pairs[index // settings.trajectories]
        assert sample.meta.pair_id == pair.pair_id
        mode = settings.vae_latent == "mode"
        x0 = expected_x0(oracle, sample, pair, mode)
        torch.testing.assert_close(sample.x0_2Chw.float(), x0, rtol=2**-10, atol=1e-5)
        prompt = "" if sample.meta.prompt_dropped else pair.prompt
        everything = dataclasses.replace(settings_nodes(settings), states=None)
        nodes = everything.nodes(family.noise_schedule, pair.pair_id, sample.meta.trajectory)
        for image in range(2):
            kept = 0
            start = sample.x0_2Chw[image].double()
            text = oracle.embed(prompt, pair.size[image], pair.crop[image])
            for t, x_s, s, x_t in oracle.trajectory(start, nodes, text, settings.renoise_steps):
                if t not in sample.timestep_K.tolist():
                    continue
                assert int(sample.timestep_K[kept]) == t
                check_state(oracle, sample, kept, image, text, x_t)
                eps = oracle.noise(x_t, t, text)
                residual = float((x_t - oracle.carry(x_s, eps, s, t)).norm() / x_t.norm())
                assert float(sample.residual_K2[kept, image]) == pytest.approx(residual, rel=0.02, abs=2e-5)
                kept += 1
            assert kept == (settings.states or settings.steps)


def test_what_is_stored_as_bfloat16_is_rounded_to_it_and_has_the_error_of_what_is_stored(some_world):
    """The same draws as in float16; it begins from the rounded x0, and ref_error is of the rounded state."""
    family, oracle = some_world
    settings = InversionSettings(storage="bfloat16", steps=4, prompt_dropout=0)
    pairs = [make_pair(number) for number in range(2)]
    samples, _ = invert(family, settings, pairs)
    for sample, pair in zip(samples, pairs, strict=True):
        assert {sample.x0_2Chw.dtype, sample.noise_K2Chw.dtype} == {torch.bfloat16}
        # Rounding to nearest moves a value by at most 2^-8 of itself; one in a hundred or so exactly to where it was.
        x0 = expected_x0(oracle, sample, pair, mode=False)
        torch.testing.assert_close(sample.x0_2Chw.float(), x0, rtol=2**-8, atol=1e-5)
        assert not torch.allclose(sample.x0_2Chw.float(), x0, rtol=2**-10, atol=1e-5)
        nodes = settings_nodes(settings).nodes(family.noise_schedule, pair.pair_id, 0)
        for image in range(2):
            text = oracle.embed(pair.prompt, pair.size[image], pair.crop[image])
            steps = oracle.trajectory(sample.x0_2Chw[image].double(), nodes, text, settings.renoise_steps)
            for k, (_, _, _, x_t) in enumerate(steps):
                check_state(oracle, sample, k, image, text, x_t, rounding=2**-8)


@dataclasses.dataclass(frozen=True)
class settings_nodes:
    """All nodes of a trajectory, whatever is stored of it."""

    settings: InversionSettings
    states: int | None = None

    def nodes(self, schedule, pair_id: str, trajectory: int) -> list[int]:
        from smpo_pipeline.inversion.timesteps import plan_trajectory

        return list(plan_trajectory(self.settings, schedule, SEED, pair_id, trajectory, tokens=64).nodes)


def test_a_grid_trajectory_equals_diffusers_inverse_scheduler(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(timesteps="grid", steps=5, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    scheduler = DDIMInverseScheduler.from_config(family.noise_schedule.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(settings.steps)
    assert scheduler.timesteps.tolist() == sample.timestep_K.tolist()
    text = oracle.embed(sample.meta.prompt)
    for image in range(2):
        x = sample.x0_2Chw[image].double()
        for k, t in enumerate(sample.timestep_K.tolist()):
            e_0 = oracle.noise(x, t, text)
            y = scheduler.step(e_0, t, x).prev_sample
            x = scheduler.step((e_0 + oracle.noise(y, t, text)) / 2, t, x).prev_sample
            check_state(oracle, sample, k, image, text, x)


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


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("method", ["smpo", "inpo"])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
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


@pytest.mark.parametrize("start", ["level0", 300])
def test_other_starts(epsilon_world, start):
    family, oracle = epsilon_world
    settings = InversionSettings(start=start, steps=6, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text = oracle.embed(sample.meta.prompt)
    shared = gaussian(trajectory_stream(SEED, "pair-1", 0, "start"), (1, 4, 8, 8))[0].double()
    first = -1 if start == "level0" else start
    for image in range(2):
        x0 = sample.x0_2Chw[image].double()
        x, s = oracle.a(first) * x0 + oracle.s(first) * shared, first
        for k, t in enumerate(sample.timestep_K.tolist()):
            noised = start != "level0" and t <= start
            x_t = oracle.a(t) * x0 + oracle.s(t) * shared if noised else oracle.step(x, s, t, text, 1)
            check_state(oracle, sample, k, image, text, x_t)
            assert bool(sample.residual_K2[k, image].isnan()) == noised
            x, s = x_t, t


def test_inpo_adds_noise_of_the_ddim_posterior(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(renoise_steps=0, eta=0.1, steps=4, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text = oracle.embed(sample.meta.prompt)
    stream = trajectory_stream(SEED, "pair-1", 0, "eta")
    drawn = [gaussian(stream, (2, 4, 8, 8)).double() for _ in range(4)]
    for image in range(2):
        x, s = sample.x0_2Chw[image].double(), -1
        for k, t in enumerate(sample.timestep_K.tolist()):
            alpha_s, alpha_t = oracle.a(s) ** 2, oracle.a(t) ** 2
            sigma = ((1 - alpha_s) / (1 - alpha_t) * (1 - alpha_t / alpha_s)) ** 0.5
            x = oracle.step(x, s, t, text, 0) + 0.1 * sigma * drawn[k][image]
            check_state(oracle, sample, k, image, text, x)
            s = t


def test_guidance_moves_the_trajectory_but_not_what_the_reference_is_asked(epsilon_world):
    family, oracle = epsilon_world
    settings = InversionSettings(guidance_scale=3.0, steps=3, renoise_steps=0, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)])
    text, empty = oracle.embed(sample.meta.prompt), oracle.embed("")
    for image in range(2):
        x, s = sample.x0_2Chw[image].double(), -1
        for k, t in enumerate(sample.timestep_K.tolist()):
            unconditional = oracle.noise(x, t, empty)
            x = oracle.carry(x, unconditional + 3.0 * (oracle.noise(x, t, text) - unconditional), s, t)
            check_state(oracle, sample, k, image, text, x)
            s = t


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
        nodes = plan_trajectory(settings, family.noise_schedule, SEED, pair.pair_id, 0, tokens=64).nodes
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


@pytest.mark.parametrize("timesteps", ["jittered", "published"])
def test_results_do_not_depend_on_batch_size_or_order(some_world, timesteps):
    family, _ = some_world
    settings = InversionSettings(timesteps=timesteps, steps=5, trajectories=2, states=3, prompt_dropout=0.3)
    pairs = [make_pair(number) for number in range(5)]
    one, _ = invert(family, settings, pairs, batch_size=1)
    for size, order in ((3, pairs), (8, pairs), (8, pairs[::-1])):
        other, _ = invert(family, settings, order, batch_size=size)
        by_name = {(sample.meta.pair_id, sample.meta.trajectory): sample for sample in other}
        for sample in one:
            twin = by_name[sample.meta.pair_id, sample.meta.trajectory]
            assert twin.meta == sample.meta
            for name, tensor in sample.tensors().items():
                torch.testing.assert_close(
                    twin.tensors()[name].double(), tensor.double(), rtol=2e-3, atol=5e-4, equal_nan=True
                )


def test_trajectories_differ_and_are_reproducible(epsilon_world):
    family, _ = epsilon_world
    settings = InversionSettings(trajectories=2)
    first, _ = invert(family, settings, [make_pair(1)])
    again, _ = invert(family, settings, [make_pair(1)])
    assert not torch.equal(first[0].timestep_K, first[1].timestep_K)
    assert not torch.equal(first[0].x0_2Chw, first[1].x0_2Chw)
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_a_inverting_denoiser_carries_the_images_and_the_reference_is_what_is_measured(epsilon_world, tmp_path):
    family, oracle = epsilon_world
    folder = make_tiny_model(tmp_path / "inverting_denoiser", "epsilon", seed=9)
    inverting_denoiser, inverting = load_family(str(folder)).denoiser, Oracle(folder, "epsilon")
    settings = InversionSettings(steps=3, prompt_dropout=0)
    (sample,), _ = invert(family, settings, [make_pair(1)], inverting_denoiser=inverting_denoiser)
    text = oracle.embed(sample.meta.prompt)
    x0 = sample.x0_2Chw[0].double()
    for k, (t, x_s, s, x_t) in enumerate(inverting.trajectory(x0, sample.timestep_K.tolist(), text)):
        check_state(oracle, sample, k, 0, text, x_t)
        residual = (x_t - inverting.carry(x_s, inverting.noise(x_t, t, text), s, t)).norm() / x_t.norm()
        assert float(sample.residual_K2[k, 0]) == pytest.approx(float(residual), rel=0.02, abs=2e-5)


def test_latents_that_overflow_are_rejected_with_a_reason(epsilon_world, tmp_path):
    folder = make_tiny_model(tmp_path / "model", "epsilon", seed=3)
    family = load_family(str(folder))
    with torch.no_grad():
        family.vae.quant_conv.bias.fill_(torch.nan)
    (sample,), health = Inverter(family, family.denoiser, InversionSettings(), 0).invert([(make_pair(0), 0)])
    assert sample.reason.startswith("not finite")
    assert all(value == 0 for band in health.to_lists() for value in band)


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


@pytest.fixture(scope="module")
def embedded():
    """The embedded world's model, and the float64 fixed points of a pair's trajectory by plain iteration."""
    folder = str(ASSETS / "model")
    family, oracle = load_family(folder), Oracle(folder, "epsilon")
    pair = embedded_pair()
    (sample,), _ = invert(family, InversionSettings(prompt_dropout=0, hflip=False), [pair])
    text, trajectories = oracle.embed(pair.prompt), []
    for image in range(2):
        x, s, trajectory = sample.x0_2Chw[image].double(), -1, []
        for t in sample.timestep_K.tolist():
            x_s = x
            for _ in range(60):
                before, x = x, oracle.carry(x_s, oracle.noise(x, t, text), s, t)
                if (x - before).norm() < 1e-8 * x.norm():
                    break
            assert (x - before).norm() < 1e-8 * x.norm()
            trajectory.append(x)
            s = t
        trajectories.append(trajectory)
    return family, oracle, pair, text, trajectories


@pytest.mark.parametrize("solver", ["adaptive", "anderson"])
def test_solvers_with_a_tolerance_store_the_exact_inversion(embedded, solver):
    family, oracle, pair, text, trajectories = embedded
    settings = InversionSettings(solver=solver, tolerance=1e-5, prompt_dropout=0, hflip=False)
    (sample,), health = invert(family, settings, [pair])
    assert float(sample.residual_K2.max()) <= 1e-5
    for image in range(2):
        for k, x_t in enumerate(trajectories[image]):
            check_state(oracle, sample, k, image, text, x_t)
    assert [band.unconverged for band in health.bands(1000)] == [0] * 5
    assert sum(band.solved for band in health.bands(1000)) == 2 * settings.steps


def test_states_that_did_not_converge_are_counted_and_their_residual_tells(embedded):
    family, _, pair, _, _ = embedded
    settings = InversionSettings(solver="adaptive", max_evaluations=3, prompt_dropout=0, hflip=False)
    (sample,), health = invert(family, settings, [dataclasses.replace(pair, measured=False)])
    unconverged = int((sample.residual_K2 > settings.tolerance).sum())
    assert unconverged > 5
    assert sum(band.unconverged for band in health.bands(1000)) == unconverged
    assert any("did not reach --tolerance" in line for line in health_warnings(health.bands(1000), settings))


@pytest.mark.parametrize("solver", ["adaptive", "anderson"])
def test_solvers_with_a_tolerance_do_not_depend_on_neighbours_or_order(embedded, solver):
    family, _, pair, _, _ = embedded
    settings = InversionSettings(solver=solver, steps=4)
    pairs = [dataclasses.replace(pair, pair_id=f"{number}") for number in range(3)]
    one, _ = invert(family, settings, pairs, batch_size=1)
    other, _ = invert(family, settings, pairs[::-1], batch_size=3)
    for sample, twin in zip(one, other[::-1], strict=True):
        assert twin.meta == sample.meta
        for name in ("noise", "ref_error"):
            torch.testing.assert_close(
                twin.tensors()[name].double(), sample.tensors()[name].double(), rtol=2e-3, atol=1e-3
            )


def test_the_residual_costs_no_evaluation_where_the_solver_has_it(epsilon_world, monkeypatch):
    """With guidance the forward that measures ref_error cannot serve, but the solver's own can."""
    family, _ = epsilon_world
    settings = InversionSettings(solver="anderson", guidance_scale=1.5, steps=3, prompt_dropout=0, tolerance=1e-3)
    inverter = Inverter(family, family.denoiser, settings, SEED)
    monkeypatch.setattr(inverter_module, "distance", None)
    (sample,), health = inverter.invert([(make_pair(1), 0)])
    assert sample.residual_K2.isfinite().all()
    unconverged = int((sample.residual_K2 > settings.tolerance).sum())
    assert sum(band.unconverged for band in health.bands(1000)) == unconverged


@pytest.mark.parametrize("solver", ["renoise", "adaptive", "anderson"])
def test_a_pair_that_is_no_number_is_rejected_and_changes_no_other(solver, tmp_path, monkeypatch):
    family = load_family(str(make_tiny_model(tmp_path / "model", "epsilon", seed=3)))
    settings = InversionSettings(solver=solver, steps=3, tolerance=1e-4)
    posterior = family.posterior
    (expected,), _ = invert_all(family, settings, [make_pair(1)])

    def broken(pixels):
        mean, std = posterior(pixels)
        mean[:2] = torch.nan  # both images of the first pair
        return mean, std

    monkeypatch.setattr(family, "posterior", broken)
    (rejected, kept), health = invert_all(family, settings, [make_pair(0), make_pair(1)])
    assert rejected.reason.startswith("not finite")
    torch.testing.assert_close(kept.noise_K2Chw, expected.noise_K2Chw, rtol=2e-3, atol=1e-3)
    assert sum(band.states for band in health.bands(1000)) == 2 * 3
    assert sum(band.solved for band in health.bands(1000)) == (0 if solver == "renoise" else 2 * 3)


@pytest.mark.parametrize("solver", ["renoise", "adaptive", "anderson"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_inverting_denoiser_that_gives_no_numbers_gives_rejected_pairs(embedded, solver, value):
    """Not the unmoved latents, which would have a finite tau and reference error."""
    family, *_ = embedded
    inverting_denoiser = copy.deepcopy(family.denoiser)
    with torch.no_grad():
        inverting_denoiser.conv_out.bias.fill_(value)
    inverter = Inverter(family, inverting_denoiser, InversionSettings(solver=solver, steps=3), SEED)
    (sample,), health = inverter.invert([(embedded_pair(), 0)])
    assert sample.reason.startswith("not finite")
    assert all(value == 0 for band in health.to_lists() for value in band)


def invert_all(family, settings: InversionSettings, pairs):
    return Inverter(family, family.denoiser, settings, SEED).invert([(pair, 0) for pair in pairs])


def test_constant_size_conditioning_is_stored_as_what_the_denoiser_was_told(some_world):
    family, _ = some_world
    pair = dataclasses.replace(make_pair(1), size=((4000, 32), (1, 1)), crop=((900, 0), (0, 0)))
    (sample,), _ = invert(family, InversionSettings(size_conditioning="constant"), [pair])
    assert sample.meta.size == ((32, 32), (32, 32))
    assert sample.meta.crop == ((0, 0), (0, 0))
    (own,), _ = invert(family, InversionSettings(), [pair])
    assert (own.meta.size, own.meta.crop) == (pair.size, pair.crop)
    assert torch.equal(own.noise_K2Chw, sample.noise_K2Chw) == (family.kind != "sdxl")
