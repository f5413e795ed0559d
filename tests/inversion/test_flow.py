"""Inversion of flow-matching models: stored tensors recomputed in float64, round trips, and what is refused."""

from __future__ import annotations

import pytest
import torch

from smpo_common.errors import UserError
from smpo_models.draws import gaussian, trajectory_stream
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_pipeline.inversion.batch import Batch, draw_trajectory
from smpo_pipeline.inversion.checks import check_settings
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.sources import renoise_visits
from smpo_pipeline.inversion.timesteps import plan_trajectory
from smpo_pipeline.toy.create import MODELS
from smpo_schemas.inversion_settings import InversionSettings
from tests.inversion.helpers import FlowOracle, embedded_pair, make_pair
from tests.tiny.families import FAMILIES, FLOW_FAMILIES
from tests.tiny.flow import make_tiny_flux

SEED = 5


@pytest.fixture(scope="module", params=FLOW_FAMILIES)
def world(request, tmp_path_factory):
    folder = FLOW_FAMILIES[request.param](tmp_path_factory.mktemp("model"), seed=3)
    return load_family(str(folder)), FlowOracle(folder)


def invert(family, settings: InversionSettings, pairs, batch_size: int = 4):
    inverter = Inverter(family, family.denoiser, settings, SEED)
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    made = [inverter.invert([(pair, 0) for pair in part]) for part in parts]
    return [sample for samples, _ in made for sample in samples], made[0][1]


def expected_x0(oracle: FlowOracle, sample, pair) -> torch.Tensor:
    pixels = torch.from_numpy(pair.pixels_2HW3.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean, std = oracle.stock.posterior(pixels.flip(-1) if sample.meta.flipped else pixels)
    return mean + std * gaussian(trajectory_stream(SEED, pair.pair_id, 0, "vae"), mean.shape)


def check_state(oracle: FlowOracle, sample, k: int, image: int, text, x_t: torch.Tensor) -> None:
    """Tau to float16's rounding of the float64 state; ref_error and ref_norm at exactly the stored state."""
    t = sample.timestep_K[k].item()
    x0, stored = sample.x0_2Chw[image].double(), sample.noise_K2Chw[k, image].double()
    tau = (x_t - oracle.a(t) * x0) / oracle.s(t)
    # Float32 states divided by a small sigma: 2e-6 of their size, over sigma.
    torch.testing.assert_close(stored, tau, rtol=2**-10, atol=3e-4 + 2e-6 / oracle.s(t))
    rebuilt = oracle.a(t) * x0 + oracle.s(t) * stored
    output = oracle.output(rebuilt, t, text)
    error = (output - oracle.target(x0, stored, t)).square().mean()
    assert sample.ref_norm_K2[k, image].item() == pytest.approx(float(output.square().mean().sqrt()), rel=1e-4)
    # Float32 outputs of size 1 are known to 1e-7, so their mean square error to 2 sqrt(error) 1e-7: Sana's is 2e-7.
    rounding = 2e-7 * float(error) ** 0.5
    assert sample.ref_error_K2[k, image].item() == pytest.approx(float(error), rel=1e-4, abs=rounding)


SETTINGS = {
    "defaults": InversionSettings(),
    "euler-grid": InversionSettings(renoise_steps=0, timesteps="grid", steps=5),
    "renoise3": InversionSettings(renoise_steps=3, steps=4, prompt_dropout=0.5),
    "some-states": InversionSettings(states=3),
}


@pytest.mark.slow
def test_every_stored_tensor_equals_an_independent_float64_trajectory(world):
    check_trajectories(*world, InversionSettings(steps=4))


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sd35"], indirect=True)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_other_settings_too(world, settings):
    """Of which no family has code of its own."""
    check_trajectories(*world, settings)


def check_trajectories(family, oracle: FlowOracle, settings: InversionSettings) -> None:
    pairs = [make_pair(number) for number in (1, 2)]  # the second one's prompt is empty
    samples, health = invert(family, settings, pairs)
    everything = settings.model_copy(update={"states": None})
    for sample, pair in zip(samples, pairs, strict=True):
        assert sample.timestep_K.dtype == torch.float32
        assert 0 < sample.timestep_K.min() < sample.timestep_K.max() < 1000
        torch.testing.assert_close(sample.x0_2Chw.float(), expected_x0(oracle, sample, pair), rtol=2**-10, atol=1e-5)
        nodes = plan_trajectory(
            everything, family.noise_schedule, SEED, pair.pair_id, 0, tokens=family.num_tokens(32, 32)
        ).nodes
        stored = sample.timestep_K.tolist()
        text = oracle.embed("" if sample.meta.prompt_dropped else pair.prompt)
        for image in range(2):
            kept = 0
            for t, x_s, s, x_t in oracle.trajectory(
                sample.x0_2Chw[image].double(), nodes, text, settings.renoise_steps
            ):
                if t not in stored:
                    continue
                check_state(oracle, sample, kept, image, text, x_t)
                residual = (x_t - oracle.carry(x_s, oracle.output(x_t, t, text), s, t)).norm() / x_t.norm()
                assert sample.residual_K2[kept, image].item() == pytest.approx(float(residual), rel=0.02, abs=2e-5)
                kept += 1
            assert kept == len(stored) == (settings.states or len(nodes))
    bands = health.bands(1000)
    assert sum(band.states for band in bands) == 2 * sum(len(sample.timestep_K) for sample in samples)


@pytest.mark.slow
def test_the_noise_ratio_is_that_of_predicted_noise(world):
    family, oracle = world
    (sample,), health = invert(family, InversionSettings(prompt_dropout=0, steps=5), [make_pair(1)])
    text, sums = oracle.embed(sample.meta.prompt), [[0.0, 0.0] for _ in range(5)]
    for k, t in enumerate(sample.timestep_K.tolist()):
        for image in range(2):
            x0 = sample.x0_2Chw[image].double()
            stored = sample.noise_K2Chw[k, image].double()
            drawn = gaussian(trajectory_stream(SEED, "pair-1", 0, f"health/{image}/{t}"), x0.shape).double()
            for column, noise in enumerate((stored, drawn)):
                x_t = oracle.a(t) * x0 + oracle.s(t) * noise
                sums[int(t * 5 // 1000)][column] += float(oracle.noise(x_t, t, text).square().sum())
    for band, (at_states, at_noised) in zip(health.bands(1000), sums, strict=True):
        assert (band.noise_ratio is None) == (at_noised == 0)
        if at_noised:
            assert band.noise_ratio == pytest.approx((at_states / at_noised) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_forward_states_and_a_start_on_the_way(world):
    family, oracle = world
    pair = make_pair(1)
    text = oracle.embed(pair.prompt)
    (forward,), _ = invert(family, InversionSettings(source="forward", prompt_dropout=0), [pair])
    assert torch.equal(forward.noise_K2Chw[:, 0], forward.noise_K2Chw[:, 1])
    assert forward.residual_K2.isnan().all()
    settings = InversionSettings(start=500, prompt_dropout=0, steps=6)
    (late,), _ = invert(family, settings, [pair])
    noised = late.timestep_K <= 500
    assert 0 < noised.sum() < len(noised)
    assert torch.equal(late.residual_K2.isnan().all(1), noised)
    shared = gaussian(trajectory_stream(SEED, pair.pair_id, 0, "start"), (1, 4, 8, 8))[0].double()
    for image in range(2):
        x0 = late.x0_2Chw[image].double()
        x, s = oracle.a(500) * x0 + oracle.s(500) * shared, 500.0
        for k, t in enumerate(late.timestep_K.tolist()):
            x_t = oracle.a(t) * x0 + oracle.s(t) * shared if noised[k] else oracle.step(x, s, t, text, 1)
            check_state(oracle, late, k, image, text, x_t)
            x, s = x_t, t


@pytest.mark.slow
def test_results_do_not_depend_on_batch_size_or_order(world):
    family, _ = world
    settings = InversionSettings(steps=4, prompt_dropout=0.3)
    pairs = [make_pair(number) for number in range(4)]
    one, _ = invert(family, settings, pairs, batch_size=1)
    other, _ = invert(family, settings, pairs[::-1], batch_size=3)
    for sample, twin in zip(one, other[::-1], strict=True):
        assert twin.meta == sample.meta
        assert torch.equal(twin.timestep_K, sample.timestep_K)
        for name, tensor in sample.tensors().items():
            torch.testing.assert_close(twin.tensors()[name].double(), tensor.double(), rtol=2e-3, atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "solver", "timesteps"), [(0, "adaptive", "grid"), (1, "anderson", "jittered")])
@torch.inference_mode()
def test_sampling_leads_back_from_an_exact_inversion(tmp_path, monkeypatch, first, solver, timesteps):
    """Over the same nodes, where each step's map contracts: the random denoiser's outputs are made small.

    Every other family for each solver; no solver has code of a family's own.
    """
    for make in list(FAMILIES.values())[first::2]:
        family = load_family(str(make(tmp_path / make.__name__, seed=3)))
        denoise = family.denoise
        monkeypatch.setattr(family, "denoise", lambda *inputs, denoise=denoise: 0.3 * denoise(*inputs))
        check_round_trip(family, [make_pair(number) for number in range(2)], solver, timesteps, tolerance=1e-6)


@pytest.mark.slow
@torch.inference_mode()
def test_sampling_leads_back_on_the_trained_flow_model_of_the_embedded_world():
    family = load_family(str(MODELS["sd3"]))
    check_round_trip(family, [embedded_pair()], "anderson", "jittered", tolerance=1e-5)


def check_round_trip(family, pairs, solver: str, timesteps: str, tolerance: float) -> None:
    settings = InversionSettings(solver=solver, tolerance=tolerance, timesteps=timesteps, steps=9, prompt_dropout=0)
    trajectories = [draw_trajectory(pair, 0, family, settings, SEED) for pair in pairs]
    batch = Batch(trajectories, family, family.denoiser, settings)
    visits = list(renoise_visits(batch))
    assert max(float(visit.solved_S.max()) for visit in visits) <= tolerance
    x = visits[-1].x_SChw
    assert float((x - batch.x0_RChw).norm() / batch.x0_RChw.norm()) > 0.02
    for visit in reversed(visits):
        direction = batch.predicted_direction(x, visit.t_S, visit.rows_S)
        x = family.noise_schedule.carry(x, direction, visit.t_S, visit.origin[1])
    assert (visits[0].origin[1] == START).all()
    assert float((x - batch.x0_RChw).norm() / batch.x0_RChw.norm()) < 1e-3


def test_jittered_timesteps_are_shifted_by_the_images_size(tmp_path):
    """One draw in each stratum of the sampler's clock, shifted; a dynamic shift by the number of tokens."""
    dynamic = load_family(str(make_tiny_flux(tmp_path / "dev"))).noise_schedule
    plain = load_family(str(make_tiny_flux(tmp_path / "schnell", guided=False))).noise_schedule
    small, large = (
        plan_trajectory(InversionSettings(), dynamic, 0, "pair", 0, tokens=tokens).nodes for tokens in (256, 4096)
    )
    unshifted = plan_trajectory(InversionSettings(), plain, 0, "pair", 0, tokens=256).nodes
    stream = trajectory_stream(0, "pair", 0, "timesteps")
    drawn = [1 + 999 * (stratum + u) / 9 for stratum, u in enumerate(stream.random(9))]
    assert unshifted == pytest.approx(drawn, rel=1e-6)
    for nodes, mu in ((small, 0.5), (large, 1.15)):
        strength = torch.tensor(mu, dtype=torch.float64).exp().item()
        assert nodes == pytest.approx([1000 * strength / (strength + 1000 / t - 1) for t in drawn], rel=2e-6)


@pytest.mark.parametrize("make", FLOW_FAMILIES.values(), ids=FLOW_FAMILIES)
def test_what_flow_models_cannot_do_is_one_line(tmp_path, make):
    family = load_family(str(make(tmp_path)), ())
    side = family.resolution()
    assert check_settings(family, "M", None, InversionSettings()) == side
    with pytest.raises(UserError, match="--timesteps published: the published code .* M is a flow model"):
        check_settings(family, "M", None, InversionSettings(timesteps="published"))
    with pytest.raises(UserError, match=r"--eta 0\.1: .* M is a flow model"):
        check_settings(family, "M", None, InversionSettings(eta=0.1))
    # Sana's pipeline takes no side below 32.
    small = "needs a multiple of 32" if family.kind == "sana" else f"was made for images of {side} pixels"
    with pytest.raises(UserError, match=f"--resolution {side // 4}: M {small}"):
        check_settings(family, "M", side // 4, InversionSettings())
    if family.kind == "sd35":
        with pytest.raises(UserError, match="--resolution 136: M knows no positions beyond 128"):
            check_settings(family, "M", 136, InversionSettings())


def test_pixart_is_checked_as_a_transformer_of_noise(tmp_path):
    """It has eta, and no published code."""
    family = load_family(str(FAMILIES["pixart-sigma"](tmp_path)), ())
    assert check_settings(family, "M", None, InversionSettings(eta=0.1)) == 32
    with pytest.raises(UserError, match="--timesteps published: .* M is pixart-sigma"):
        check_settings(family, "M", None, InversionSettings(timesteps="published"))
    with pytest.raises(UserError, match="--resolution 36: M needs a multiple of 8"):
        check_settings(family, "M", 36, InversionSettings())
