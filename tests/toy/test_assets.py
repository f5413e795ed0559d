"""The shipped checkpoints: their size, their layout, their tokenizer and their autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.toy_world.autoencoder import POSTERIOR_STD
from benchmarks.toy_world.flow_base import PADDING, PaddingOnce
from benchmarks.toy_world.rewards import TASTES, normalise, score
from benchmarks.toy_world.tokenizer import MAX_TOKENS, build_tokenizer
from benchmarks.toy_world.training import to_pixels, training_renders
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from smpo_pipeline.toy.create import ASSETS, MODELS
from smpo_pipeline.toy.sampling import load_pipeline, sample_images
from smpo_pipeline.toy.world import all_captions, words

MAX_BYTES = 14_000_000


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline(ASSETS / "model")


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """Each of the base models."""
    return load_pipeline(MODELS[request.param])


def test_total_size() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < MAX_BYTES


def test_no_trace_of_the_machine_that_built_them() -> None:
    assert not [path for path in ASSETS.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_no_pickle() -> None:
    assert {path.suffix for path in ASSETS.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


@pytest.mark.parametrize(
    "folder",
    ["model/tokenizer", "model-sd3/tokenizer", "model-sd3/tokenizer_2", *(f"rewards/{name}" for name in TASTES)],
)
def test_every_word_is_one_token(folder: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / folder)
    assert tokenizer.model_max_length == MAX_TOKENS
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words())
    for caption in all_captions():
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption
    assert tokenizer(all_captions()).input_ids == build_tokenizer()(all_captions()).input_ids


def test_any_text_has_tokens() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "model" / "tokenizer")
    for text in ("", "naïve 猫 \u0301", "word " * 500):
        ids = tokenizer(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == MAX_TOKENS
        assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == ids[-1]
    assert tokenizer.decode(tokenizer("naïve 猫").input_ids, skip_special_tokens=True) == "naïve 猫"


def test_sampled_latents_have_unit_scale(pipeline: StableDiffusionPipeline) -> None:
    vae: AutoencoderKL = pipeline.vae
    images, _ = training_renders(256, np.random.default_rng(3))
    with torch.no_grad():
        posterior = vae.encode(to_pixels(images)).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, POSTERIOR_STD), rtol=0.01, atol=0)
    latents = posterior.sample(torch.Generator().manual_seed(0)) * vae.config["scaling_factor"]
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1


def test_sampling_is_the_stock_pipeline(base: DiffusionPipeline) -> None:
    caption, seed = all_captions()[5], 11
    ours = sample_images(base, [caption], [seed], guidance_scale=2.0, num_steps=4)[0]
    stock = base(
        caption,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images[0]
    assert np.abs(ours.astype(float) - stock * 255).max() <= 1.0


def test_the_flow_base_was_trained_on_what_its_pipeline_gives_it() -> None:
    """In training one token stands for all the zeros that the pipeline pads text with."""
    transformer = load_pipeline(MODELS["sd3"]).transformer
    stream = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(2, *shape, generator=stream) for shape in ((4, 8, 8), (16, 96), (96,)))

    def output(padding: int) -> torch.Tensor:
        padded = torch.nn.functional.pad(text, (0, 0, 0, padding))
        with torch.no_grad():
            return transformer(latents, padded, pooled, torch.tensor([100.0, 900.0])).sample

    whole = output(PADDING)
    transformer.set_attn_processor(PaddingOnce())
    torch.testing.assert_close(output(1), whole, rtol=1e-4, atol=1e-5)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    assert (output(1) - whole).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(TASTES))
def test_reward_models_load_as_pickscore_does(name: str) -> None:
    folder = ASSETS / "rewards" / name
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(folder)
    images, captions = training_renders(4, np.random.default_rng(4))
    inputs = processor(text=captions, images=list(images), padding="max_length", return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], normalise(images), rtol=0, atol=1e-5)
    with torch.no_grad():
        similarity = clip(**inputs).logits_per_text / clip.logit_scale.exp()
    ours = score(clip, processor.tokenizer, images, captions)
    np.testing.assert_allclose(similarity.diagonal().numpy(), ours, atol=1e-4)
