"""Guidance with a negative model: pipelines against both denoisers asked by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from smpo_common.errors import UserError
from smpo_models.family import Family
from smpo_models.loading import load_family
from smpo_models.noise_schedules.base import START
from smpo_models.sampling import load_pipeline, sample
from smpo_models.tuned.merge import merge_into
from smpo_models.tuned.negative import guide_with_negative
from tests.models.stock import load_stock
from tests.models.test_flow_families import MODELS as FLOW_MODELS
from tests.tiny.stable_diffusion import make_tiny_model, make_tiny_unet, make_tiny_xl

PROMPTS = ["a cat", "a dog and a cat"]
STEPS = 4
_OTHERS = {"sd3-without-t5", "sd35-dynamic", "flux1-dev", "flux1-schnell"}
MODELS = {"sd15": make_tiny_model, "sdxl": make_tiny_xl} | {
    name: make for name, make in FLOW_MODELS.items() if name not in _OTHERS
}


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory) -> Family:
    return load_family(str(MODELS[request.param](tmp_path_factory.mktemp(request.param))))


def another(denoiser: torch.nn.Module) -> torch.nn.Module:
    """A denoiser of the same architecture with other weights."""
    other, generator = copy.deepcopy(denoiser), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return other


def draw(family: Family, guidance: float, negative: torch.nn.Module | None = None) -> torch.Tensor:
    """Latents by the model's pipeline, in first-order steps."""
    parts = {family.denoiser_folder: family.denoiser}
    pipeline = load_pipeline(family._model, "--model m", parts, dtype=torch.float32, variant=None, sampler="ddim")
    if negative is not None:
        guide_with_negative(pipeline, family, negative)
    with torch.no_grad():
        return sample(
            pipeline, family, PROMPTS, noise_of(family), steps=STEPS, guidance_scale=guidance, output_type="latent"
        )


def noise_of(family: Family) -> torch.Tensor:
    return torch.randn(len(PROMPTS), *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_the_same_model_twice_guides_as_one_to_the_bit(family):
    assert torch.equal(draw(family, 4.0, copy.deepcopy(family.denoiser)), draw(family, 4.0))


@pytest.mark.slow
def test_without_guidance_the_negative_model_is_not_asked(family):
    assert torch.equal(draw(family, 1.0, another(family.denoiser)), draw(family, 1.0))


@pytest.mark.slow
@torch.no_grad()
def test_a_failed_call_does_not_exchange_the_models(family):
    """As where memory runs out and fewer images are drawn after it."""
    negative, calls = another(family.denoiser), []
    wanted = draw(family, 4.0, negative)

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError

    parts = {family.denoiser_folder: family.denoiser}
    pipeline = load_pipeline(family._model, "--model m", parts, dtype=torch.float32, variant=None, sampler="ddim")
    guide_with_negative(pipeline, family, negative)
    pair = getattr(pipeline, family.denoiser_folder)
    hooks = [model.register_forward_pre_hook(fail) for model in (pair.positive, pair.negative)]
    options = {"steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"}
    for attempt in range(3):
        calls[:] = [1] * attempt if attempt < 2 else [1] * 9
        if attempt < 2:  # in the first and in the second call of the first step
            with pytest.raises(MemoryError):
                sample(pipeline, family, PROMPTS, noise_of(family), **options)
        else:
            assert torch.equal(sample(pipeline, family, PROMPTS, noise_of(family), **options), wanted)
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
@torch.no_grad()
def test_the_negative_model_predicts_for_the_unconditional_prompt(family):
    negative, guidance, schedule, x = another(family.denoiser), 1.5, family.noise_schedule, noise_of(family)
    wanted = draw(family, guidance, negative)
    frames = [(32, 32)] * len(PROMPTS), [(0, 0)] * len(PROMPTS)
    conditioning, unconditional = family.condition(PROMPTS, *frames), family.condition([""] * len(PROMPTS), *frames)
    guided = guidance_of(family)
    grid = [START, *schedule.grid(STEPS, family.num_tokens(32, 32))]
    for s, t in zip(grid[-2::-1], grid[::-1], strict=False):
        t_B, s_B = (torch.full((len(x),), level, dtype=schedule.timestep_dtype) for level in (t, s))
        away = family.denoise(negative, x, t_B, unconditional)
        own = family.denoise(family.denoiser, x, t_B, conditioning)
        output = guided(own, away, guidance)
        x = schedule.noised(schedule.x0_in(output, x, t_B), schedule.noise_in(output, x, t_B), s_B)
    assert float((x - wanted).norm() / wanted.norm()) < 1e-4
    assert float((x - draw(family, guidance)).norm() / wanted.norm()) > 1e-3


def guidance_of(family: Family) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """How the stock pipeline joins both predictions: some keep the norm of the conditional one."""
    if family.denoiser_folder == "unet":
        return lambda conditional, unconditional, scale: unconditional + scale * (conditional - unconditional)
    parts = {"text_encoder_3": None, "tokenizer_3": None} if family.kind.startswith("sd3") else {}
    stock = load_stock(family._model, **parts)
    stock.shape = (32, 32)
    return stock.guided


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell"])
def test_a_pipeline_without_an_unconditional_prediction_is_refused(tmp_path, name):
    family = load_family(str(FLOW_MODELS[name](tmp_path)))
    with pytest.raises(UserError, match=f"the negative model: {name} is sampled without an unconditional prediction"):
        draw(family, 2.0, copy.deepcopy(family.denoiser))


def test_another_architecture_is_refused_by_the_name_of_a_weight(tmp_path):
    family = load_family(str(make_tiny_model(tmp_path)))
    with pytest.raises(UserError, match=r"the negative model has .*to_k\.weight \(.*one architecture"):
        draw(family, 2.0, make_tiny_unet(cross_attention_dim=8))


def filled(value: float) -> torch.nn.Module:
    layer = torch.nn.Linear(2, 3)
    for weight in layer.parameters():
        torch.nn.init.constant_(weight, value)
    return layer


def test_merging_adds_weighted_differences():
    base = filled(1)
    merge_into(base, {"positive": (filled(2), 0.5), "negative": (filled(4), 0.25)})
    assert all((weight == 2.25).all() for weight in base.parameters())


@pytest.mark.parametrize(("weights", "chosen"), [((1, 0), 1), ((0, 1), 2), ((0, 0), 0)])
def test_a_weight_of_one_alone_gives_that_model_to_the_bit(weights, chosen):
    torch.manual_seed(0)
    models = [torch.nn.Linear(20, 30) for _ in range(3)]
    wanted = [weight.clone() for weight in models[chosen].parameters()]
    merge_into(models[0], dict(zip("ab", zip(models[1:], weights, strict=True), strict=True)))
    for weight, expected in zip(models[0].parameters(), wanted, strict=True):
        assert torch.equal(weight, expected)


def test_merging_another_architecture_is_refused():
    with pytest.raises(UserError, match=r"--negative x has bias None, the base \(3,\)"):
        merge_into(filled(1), {"--negative x": (torch.nn.Linear(2, 3, bias=False), 1.0)})
