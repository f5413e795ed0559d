"""Stable Diffusion XL: its conditioning is what its pipeline gives its UNet."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from smpo_models.loading import load_family
from tests.tiny.stable_diffusion import make_tiny_xl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_xl(tmp_path_factory.mktemp("xl"))


def pipeline_call(folder, **arguments) -> dict:
    """What the pipeline gives its UNet in its first step."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    forward = pipeline.unet.forward

    def capture(*positional, **named):
        calls.append(named)
        return forward(*positional, **named)

    pipeline.unet.forward = capture
    pipeline(num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0), **arguments)
    return calls[0]


def our_call(family, prompts, sizes, crops, latents) -> dict:
    calls = []
    forward = family.denoiser.forward

    def capture(*positional, **named):
        calls.append(named)
        return forward(*positional, **named)

    family.denoiser.forward = capture
    try:
        t_B = torch.full((len(prompts),), 500)
        family.denoise(family.denoiser, latents, t_B, family.condition(prompts, sizes, crops))
    finally:
        family.denoiser.forward = forward
    return calls[0]


def check_equal(ours: dict, theirs: dict) -> None:
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert ours["added_cond_kwargs"].keys() == theirs["added_cond_kwargs"].keys()
    for name, value in theirs["added_cond_kwargs"].items():
        torch.testing.assert_close(ours["added_cond_kwargs"][name], value)


@pytest.mark.parametrize(
    "prompt", ["a cat and a dog", "Größe 東京", "dog " * 100], ids=["plain", "unicode", "too long"]
)
def test_conditioning_equals_the_pipelines(folder, prompt):
    theirs = pipeline_call(
        folder, prompt=prompt, guidance_scale=1, original_size=(700, 300), crops_coords_top_left=(11, 5)
    )
    family = load_family(str(folder))
    check_equal(our_call(family, [prompt], [(700, 300)], [(11, 5)], torch.randn(1, 4, 8, 8)), theirs)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_what_the_pipeline_guides_with(folder, tmp_path, zeros):
    model = make_tiny_xl(tmp_path / "model")
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(model)
    theirs = pipeline_call(model, prompt="a cat", guidance_scale=5, original_size=(40, 32))
    family = load_family(str(model))
    ours = our_call(family, ["", "a cat"], [(40, 32)] * 2, [(0, 0)] * 2, torch.randn(2, 4, 8, 8))
    check_equal(ours, theirs)
    assert bool((ours["encoder_hidden_states"][0] == 0).all()) == zeros


def test_the_empty_prompt_may_be_encoded_as_any_other(folder):
    """Against transformers alone: the states before the last layer of both encoders, and the second one's embedding."""
    family = load_family(str(folder), ("text",))
    family.encodes_empty_prompt = True
    text = family.encode_text(["", "a cat"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        ids = tokenizer(
            [""], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output.get("text_embeds")
    torch.testing.assert_close(text["text"][:1], torch.cat(states, dim=-1))
    torch.testing.assert_close(text["pooled"][:1], pooled)
    assert not torch.equal(text["text"][0], torch.zeros_like(text["text"][0]))


def test_the_target_size_is_what_the_latents_decode_to(folder):
    theirs = pipeline_call(folder, prompt="a cat", guidance_scale=1, height=48, width=32, original_size=(90, 60))
    family = load_family(str(folder))
    check_equal(our_call(family, ["a cat"], [(90, 60)], [(0, 0)], torch.randn(1, 4, 12, 8)), theirs)
    assert theirs["added_cond_kwargs"]["time_ids"].tolist() == [[90, 60, 0, 0, 48, 32]]


def test_each_image_has_its_own_size_whatever_the_batch(folder):
    family = load_family(str(folder))
    prompts, sizes, crops = ["a cat", "", "a cat"], [(30, 3000), (4, 4), (50, 60)], [(0, 99), (0, 0), (1, 2)]
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    together = family.denoise(family.denoiser, x, t, family.condition(prompts, sizes, crops))
    for row in range(3):
        alone = family.condition(prompts[row : row + 1], sizes[row : row + 1], crops[row : row + 1])
        expected = family.denoise(family.denoiser, x[row : row + 1], t[row : row + 1], alone)
        torch.testing.assert_close(together[row : row + 1], expected)
    assert not torch.allclose(together[0], family.denoise(family.denoiser, x[:1], t[:1], alone)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_denoisers_stay_near_the_wide_one(folder, dtype):
    family = load_family(str(folder))
    conditioning = family.condition(["a cat"], [(1365, 1023)], [(0, 0)])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([700])
    wide = family.denoise(family.denoiser, x, t, conditioning)
    narrow = family.denoise(family.denoiser.to(dtype), x, t, conditioning)
    assert narrow.dtype == torch.float32
    assert float((narrow - wide).norm() / wide.norm()) < 20 * torch.finfo(dtype).eps
