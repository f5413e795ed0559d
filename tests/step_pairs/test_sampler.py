"""Step pairs of tiny models, against float64 with diffusers' parts alone, and what they must not depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smpo_common.errors import UserError
from smpo_models.draws import gaussian, image_noise, named_stream
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_pipeline.generation.generator import Wanted
from smpo_pipeline.isolation import Failure
from smpo_pipeline.rewards import Reward, Scored
from smpo_pipeline.step_pairs.gradient import gradient_delta
from smpo_pipeline.step_pairs.pairs import best_and_worst
from smpo_pipeline.step_pairs.plan import plan_steps
from smpo_pipeline.step_pairs.sampler import StepSampler
from smpo_schemas.inversion_settings import InversionSettings
from smpo_schemas.manifest import StepSettings
from smpo_schemas.shards.samples import Sample
from tests.inversion.helpers import Oracle
from tests.tiny.flow import make_tiny_sd3
from tests.tiny.stable_diffusion import IMAGE_SIDE, LATENT_SHAPE, make_tiny_model

WANTED: list[Wanted] = [("a cat", 0), ("a dog and a cat", 0), ("a cat", 1)]
SEED, STEPS = 3, 5
SHAPE = (1, 2, *LATENT_SHAPE)


class Redness(Reward):
    """How much redder than green an image is; it gives none for prompts with ``dog`` if told so."""

    name, unit, default_model, model, fingerprint = "redness", "grey levels", None, "redness", "1"

    def __init__(self, *, no_dogs: bool = False) -> None:
        self._no_dogs = no_dogs
        self.images: list[np.ndarray] = []

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        arrays = [np.asarray(image, float) for image in images]
        self.images += arrays
        scores = np.array([array[..., 0].mean() - array[..., 1].mean() for array in arrays])
        blind = [self._no_dogs and "dog" in prompt for prompt in prompts]
        return np.where(blind, np.nan, scores)

    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        return Scored(self.score(images, prompts), {2: "no answer: broken"} if self._no_dogs else {})


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return make_tiny_model(tmp_path_factory.mktemp("model"), request.param, seed=3), request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "sd", seed=3)


class Grey(Redness):
    """Minus the mean squared distance of an image's values from the middle."""

    unit = "cosine"
    name = "grey"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:  # noqa: ARG002
        return np.array([-np.square(np.asarray(image, float) / 255 - 0.5).mean() for image in images])

    def score_with_reasons(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Scored:
        return Scored(self.score(images, prompts))

    def score_tensor(self, images_N3HW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:  # noqa: ARG002
        return -(images_N3HW - 0.5).square().mean((1, 2, 3))


class Misled(Grey):
    """Its gradient leads the wrong way."""

    def score_tensor(self, images_N3HW: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return -super().score_tensor(images_N3HW, prompts)


def sampler(
    family: Family, *, trained: Sequence[int] = (5, 4, 3, 1), reward: Reward | None = None, **more: object
) -> StepSampler:
    steps, chosen = plan_steps(family, "it", IMAGE_SIDE, steps=STEPS, eta=1, trained=trained)
    own = {"candidates": 2, "continue_from": "winner", "gap": 0.0, "gradient_delta": None}
    of_steps = {name: more.pop(name, default) for name, default in own.items()}
    settings = {"source": "steps", "steps": STEPS, "eta": 1, "guidance_scale": 3.0, **more}
    return StepSampler(
        family,
        None,
        InversionSettings(**settings),
        StepSettings(grid=list(steps.grid), trained=chosen, **of_steps),
        reward or Redness(),
        seed=SEED,
        side=IMAGE_SIDE,
    )


def samples(made: Sequence[Sequence[Sample | Failure]]) -> list[list[Sample]]:
    assert all(isinstance(pair, Sample) for pairs in made for pair in pairs)
    return [[pair for pair in pairs if isinstance(pair, Sample)] for pairs in made]


def states(family: Family, sample: Sample) -> torch.Tensor:
    """x_t as both images rebuild it: [2, C, h, w]."""
    t = sample.timestep_K.repeat(2)
    return family.noise_schedule.noised(sample.x0_2Chw.float(), sample.noise_K2Chw[0].float(), t)


def draws(family: Family, sample: Sample) -> torch.Tensor:
    """Both x_s, of the stored state: [2, C, h, w]."""
    steps, _ = plan_steps(family, "it", IMAGE_SIDE, steps=STEPS, eta=1, trained=None)
    x_2Chw = states(family, sample)
    return steps.transition(family.noise_schedule, sample.timestep_K, x_2Chw).mean(x_2Chw, sample.x0_2Chw.float())


@pytest.mark.slow
def test_a_trajectory_in_float64(folder: tuple[Path, str]) -> None:
    """Eta 1 by DDIM's own formulas, guidance, the Tweedie image's score, and the reference's error without guidance."""
    path, prediction_type = folder
    family, oracle = load_family(str(path)), Oracle(path, prediction_type)
    prompt, number = WANTED[1]
    reward = Redness()
    ((*pairs,),) = samples(sampler(family, reward=reward).sample([(prompt, number)]))
    text, empty = oracle.embed(prompt), oracle.embed("")

    def noise(x: torch.Tensor, t: int) -> torch.Tensor:
        free = oracle.output(x, t, empty)
        output = free + 3.0 * (oracle.output(x, t, text) - free)
        return {"epsilon": output, "v_prediction": oracle.a(t) * output + oracle.s(t) * x}[prediction_type]

    x, made, seen = image_noise(SEED, prompt, number, LATENT_SHAPE).double(), iter(pairs), iter(reward.images)
    for step, t, s in ((5, 801, 601), (4, 601, 401), (3, 401, 201), (2, 201, 1), (1, 1, -1)):
        a_t, s_t, a_s, s_s = oracle.a(t), oracle.s(t), oracle.a(s), oracle.s(s)
        sigma = s_s / s_t * (1 - (a_t / a_s) ** 2) ** 0.5
        c = (s_s**2 - sigma**2) ** 0.5 - a_s * s_t / a_t
        mean = a_s / a_t * x + c * noise(x, t)
        both = [
            mean + sigma * gaussian(named_stream(f"{SEED}/step/{step}/{number}/{index}\n{prompt}"), LATENT_SHAPE)
            for index in range(2)
        ]
        if step == 2:
            x = both[0]
            continue
        pair = next(made)
        assert pair.timestep_K.tolist() == [t]
        for index, draw in enumerate(both):
            estimate = draw if s < 0 else (draw - oracle.s(s) * noise(draw, s)) / oracle.a(s)
            with torch.no_grad():
                image = oracle.vae.decode(estimate.float()[None] / oracle.vae.config.scaling_factor).sample[0]
            wanted = ((image / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()
            assert np.abs(next(seen) - wanted).max() < 1.5
            own = (draw - a_s / a_t * x) / c
            stored = pair.x0_2Chw[index].double(), pair.noise_K2Chw[0, index].double()
            np.testing.assert_allclose(stored[0], (x - s_t * own) / a_t, rtol=2e-3, atol=2e-3)
            # The noise makes up for the rounding of x0.
            np.testing.assert_allclose(stored[1], (x - a_t * stored[0]) / s_t, rtol=2e-3, atol=2e-3)
            rounding = 2**-10 * float(stored[0].abs().max()) * a_t / s_t
            np.testing.assert_allclose(stored[1], own, atol=2e-3 + rounding)
            output = oracle.output(a_t * stored[0] + s_t * stored[1], t, text)
            error = (output - oracle.target(*stored, t)).square().mean()
            assert float(pair.ref_error_K2[0, index]) == pytest.approx(float(error), rel=1e-4)
            assert float(pair.ref_norm_K2[0, index]) == pytest.approx(float(output.square().mean() ** 0.5), rel=1e-4)
        first, second = pair.meta.scores["redness"]
        assert pair.meta.label == float(first > second)
        x = both[0 if first >= second else 1]
    assert next(made, None) is next(seen, None) is None


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_both_images_rebuild_the_state_and_the_winner_goes_on(kind: str, model: Path, tmp_path: Path) -> None:
    """From pure noise on, where a_t of flow models is 0."""
    family = load_family(str(model if kind == "sd" else make_tiny_sd3(tmp_path / "sd3")))
    for wanted, pairs in zip(
        WANTED, samples(sampler(family, trained=(5, 4, 3), guidance_scale=1).sample(WANTED)), strict=True
    ):
        began = states(family, pairs[0])[0]
        np.testing.assert_allclose(began, image_noise(SEED, *wanted, LATENT_SHAPE), atol=4e-3)
        assert pairs[0].timestep_K.item() < family.noise_schedule.num_train_timesteps
        for pair, following in zip(pairs, [*pairs[1:], None], strict=True):
            x_2 = states(family, pair)
            np.testing.assert_allclose(x_2[0], x_2[1], atol=6e-3)
            if following is None:
                break
            winner, both = (0 if pair.meta.label == 1 else 1), draws(family, pair)
            np.testing.assert_allclose(both[winner], states(family, following)[0], atol=2e-2)
            assert (both[0] - both[1]).abs().max() > 0.1


@pytest.mark.slow
def test_results_do_not_depend_on_batch_size_or_order(model: Path) -> None:
    make = sampler(load_family(str(model)), trained=(5, 4, 3))
    together = dict(zip(WANTED, samples(make.sample(WANTED)), strict=True))
    alone = {wanted: samples(make.sample([wanted]))[0] for wanted in reversed(WANTED)}
    for wanted, pairs in together.items():
        for one, other in zip(pairs, alone[wanted], strict=True):
            assert one.meta.model_dump(exclude={"scores"}) == other.meta.model_dump(exclude={"scores"})
            assert one.meta.scores["redness"] == pytest.approx(other.meta.scores["redness"], abs=0.05)
            for name, tensor in one.tensors().items():
                torch.testing.assert_close(
                    other.tensors()[name].double(), tensor.double(), rtol=2e-3, atol=1e-2, equal_nan=True
                )
    assert len({pair.meta.pair_id for pairs in together.values() for pair in pairs}) == 9


def test_evaluations_are_those_of_the_guide(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 to sample a trajectory, and 10 of the reference; with guidance the first twice."""
    family, asked = load_family(str(model)), []
    inner = type(family).denoise
    monkeypatch.setattr(type(family), "denoise", lambda *given: asked.append(len(given[2])) or inner(*given))
    for guidance, count in ((1, 33), (3, 56)):
        steps, chosen = plan_steps(family, "it", IMAGE_SIDE, steps=20, eta=1, trained=None)
        made = StepSettings(grid=list(steps.grid), trained=chosen, candidates=2, continue_from="winner", gap=0)
        settings = InversionSettings(source="steps", steps=20, eta=1, guidance_scale=guidance)
        asked.clear()
        StepSampler(family, None, settings, made, Redness(), seed=SEED, side=IMAGE_SIDE).sample(WANTED[:1])
        assert sum(asked) == count


def test_exchanged_candidates_exchange_all(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = sampler(load_family(str(model)), trained=(5,))
    ((first,),) = samples(make.sample(WANTED[:1]))
    inner = StepSampler._draw
    monkeypatch.setattr(StepSampler, "_draw", lambda *given: inner(*given).flip(1))
    ((second,),) = samples(make.sample(WANTED[:1]))
    assert second.meta.label == 1 - first.meta.label
    assert second.meta.scores["redness"] == pytest.approx(first.meta.scores["redness"][::-1])
    torch.testing.assert_close(second.noise_K2Chw, first.noise_K2Chw.flip(1), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(second.ref_error_K2, first.ref_error_K2.flip(1), rtol=1e-3, atol=1e-5)


def test_ties_more_candidates_and_a_random_one(model: Path) -> None:
    family = load_family(str(model))
    (tied,) = samples(sampler(family, trained=(5, 4), gap=1e6).sample(WANTED[:1]))
    assert [pair.meta.label for pair in tied] == [0.5, 0.5]
    reward = Redness()
    ((pair,),) = samples(sampler(family, trained=(5,), candidates=4, reward=reward).sample(WANTED[:1]))
    scores = reward.score([Image.fromarray(array.astype(np.uint8)) for array in reward.images[:4]], ["a cat"] * 4)
    assert sorted(pair.meta.scores["redness"]) == pytest.approx([scores.min(), scores.max()])
    random = sampler(family, trained=(5, 4), continue_from="random")
    for number in range(4):
        (pairs,) = samples(random.sample([("a cat", number)]))
        drawn = int(named_stream(f"{SEED}/step/5/{number}/continue\na cat").integers(2))
        np.testing.assert_allclose(draws(family, pairs[0])[drawn], states(family, pairs[1])[0], atol=2e-2)


@pytest.mark.parametrize(
    ("scores", "places"),
    [
        ([0.1, 0.3], (0, 1)),
        ([0.3, 0.1, 0.2], (0, 1)),
        ([0.2, 0.1, 0.3], (1, 2)),
        ([0.2, 0.2, 0.2], (0, 2)),
        ([np.nan, 0.1, 0.2], (1, 2)),
        ([np.nan, np.nan, 0.2], (0, 2)),
        ([0.2, np.nan, np.nan], (0, 2)),
        ([np.nan, np.nan], (0, 1)),
    ],
)
def test_the_best_and_the_worst(scores: list[float], places: tuple[int, int]) -> None:
    assert best_and_worst(np.array(scores)) == places


@pytest.mark.slow
def test_pairs_without_a_score_or_a_number_are_rejected_and_the_others_made(model: Path) -> None:
    family = load_family(str(model))
    whole = samples(sampler(family).sample(WANTED))
    made = sampler(family, reward=Redness(no_dogs=True)).sample(WANTED)
    assert [pair for pair in made[1] if isinstance(pair, Sample)] == []
    assert {pair.reason for pair in made[1] if isinstance(pair, Failure)} == {"no answer: broken"}
    (alone,) = sampler(family, trained=(5,), reward=Redness(no_dogs=True)).sample(WANTED[1:2])
    assert alone == [Failure("no score: redness gives draw 0 none")]
    assert [pair.meta.label for pair in samples([made[0]])[0]] == [pair.meta.label for pair in whole[0]]
    with torch.no_grad():
        family.denoiser.conv_out.bias.fill_(torch.nan)
    (failed,) = sampler(family, trained=(5, 4)).sample(WANTED[:1])
    assert all(isinstance(pair, Failure) and pair.reason.startswith("not finite: draws of step") for pair in failed)


@pytest.mark.parametrize(("guidance", "trained"), [(3.0, 5), (1, 1)])
def test_gradient_guidance(model: Path, guidance: float, trained: int) -> None:
    """The best draw moves by 2 eta_t delta 100^2 grad r, the other stays; one that lowers its reward does not."""
    family = load_family(str(model))
    own = {"trained": (trained,), "reward": Grey(), "guidance_scale": guidance}
    ((plain,),) = samples(sampler(family, **own).sample(WANTED[:1]))
    ((moved,),) = samples(sampler(family, **own, gradient_delta=1.0).sample(WANTED[:1]))
    ((kept,),) = samples(sampler(family, **own | {"reward": Misled()}, gradient_delta=1.0).sample(WANTED[:1]))
    best = 0 if plain.meta.label == 1 else 1
    assert moved.meta.label == plain.meta.label
    assert torch.equal(kept.noise_K2Chw, plain.noise_K2Chw)
    assert moved.meta.scores["grey"][best] > plain.meta.scores["grey"][best]
    assert torch.equal(moved.x0_2Chw[1 - best], plain.x0_2Chw[1 - best])
    t = int(plain.timestep_K)
    size = 2 * (0.1 + 0.1 * (1 + math.cos(math.pi * t / 1000)) / 2) * 100**2
    shift = (draws(family, moved) - draws(family, plain))[best].double() / size

    def reward(x: torch.Tensor) -> float:
        """Of the estimated image at x_s, without gradients."""
        with torch.no_grad():
            if t > 1:
                text, empty = (family.condition([prompt], [(32, 32)], [(0, 0)]) for prompt in ("a cat", ""))
                s = torch.tensor([t - 200])
                free, full = (family.denoise(family.denoiser, x, s, each) for each in (empty, text))
                x = family.noise_schedule.x0_in(free + guidance * (full - free), x, s)
            return float(-(family.decode(x).double() / 2).square().mean())

    x_s = draws(family, plain)[best : best + 1]
    along = (shift / shift.norm()).float()[None]
    slope = (reward(x_s + 0.05 * along) - reward(x_s - 0.05 * along)) / 0.1
    assert slope == pytest.approx(float(shift.norm()), rel=0.05)


def test_refused_rewards() -> None:
    assert gradient_delta(Grey, None) == 0.005
    assert gradient_delta(Grey, 0.1) == 0.1
    with pytest.raises(UserError, match="redness gives no gradient; those that do: aesthetic, clipscore, pickscore"):
        gradient_delta(Redness, None)


def test_refused_steps(model: Path, tmp_path: Path) -> None:
    vp, flow = load_family(str(model), ()), load_family(str(make_tiny_sd3(tmp_path / "sd3")), ())

    def plan(family: Family, *, steps: int = 20, eta: float = 1, trained: Sequence[int] | None = None) -> list[int]:
        return plan_steps(family, "it", IMAGE_SIDE, steps=steps, eta=eta, trained=trained)[1]

    assert plan(vp) == plan(flow) == [20, 16, 12, 8, 4]
    assert plan(vp, steps=5) == [5]
    assert plan(vp, trained=(1, 3)) == [3, 1]
    for given in ((0, 3), (21,)):
        with pytest.raises(UserError, match="--steps 20 has the steps 1 .* to 20"):
            plan(vp, trained=given)
    with pytest.raises(UserError, match="--trained 1: this step of it ends without noise"):
        plan(flow, trained=(5, 1))
    with pytest.raises(UserError, match="--eta 0: the steps of it need noise"):
        plan(vp, eta=0)
    with pytest.raises(UserError, match="--eta 0.5: it is a flow model"):
        plan(flow, eta=0.5)
