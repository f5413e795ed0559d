"""The world's base model: a small Stable Diffusion that often gets the caption wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.toy_world.autoencoder import LATENT_CHANNELS
from benchmarks.toy_world.tokenizer import MAX_TOKENS
from benchmarks.toy_world.training import Report, steps, to_pixels, training_renders
from smpo_pipeline.toy.world import RADIUS_OF_SIZE, RGB_OF_COLOUR, SHAPES, captions_of, scene_of

CORRUPTED_SHARE = 0.22
"""Training captions with attributes that are not those of the picture: the base learns to make mistakes from them."""

DROPPED_SHARE = 0.1
"""Training captions that are emptied, for classifier-free guidance."""

_HIDDEN = 64
_BATCH = 64
_POOL_IMAGES = 16384
_CHOICES = {
    "size": tuple(RADIUS_OF_SIZE),
    "colour": tuple(RGB_OF_COLOUR),
    "shape": SHAPES,
    "background": tuple(RGB_OF_COLOUR),
}


def train_base(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    rng: np.random.Generator,
    rounds: Sequence[tuple[int, float]],
    report: Report,
) -> StableDiffusionPipeline:
    """Trains a denoiser and its text encoder on sampled latents of renders of the train split.

    Noise and timesteps come from torch's global generator.

    Args:
        vae: the trained autoencoder; stays as it is.
        tokenizer: the world's.
        rng: draws the pictures, the captions and their mistakes.
        rounds: (training steps of 64 pictures, peak learning rate) of each round, with its own warm-up and decay.
        report: takes progress lines.

    Returns:
        the pipeline of all components, without a safety checker, with SD1.5's DDIM scheduler.
    """
    unet, text_encoder, scheduler = _new_unet(), CLIPTextModel(text_config(tokenizer, _HIDDEN)), _new_scheduler()
    data = TrainingLatents(vae, rng)
    unet.train()
    text_encoder.train()
    num_timesteps = scheduler.config["num_train_timesteps"]
    trained = [*unet.parameters(), *text_encoder.parameters()]
    for make_step in chain.from_iterable(steps("base", trained, count, lr, report) for count, lr in rounds):
        latents, captions = data.draw(_BATCH)
        tokens = token_ids(tokenizer, [training_text(caption, rng) for caption in captions])
        noise, timestep = torch.randn_like(latents), torch.randint(num_timesteps, (_BATCH,))
        noisy = scheduler.add_noise(latents, noise, timestep)
        predicted = unet(noisy, timestep, text_encoder(tokens).last_hidden_state).sample
        make_step((predicted - noise).square().mean())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TrainingLatents:
    """Latents of renders of the train split, and their captions."""

    def __init__(self, vae: AutoencoderKL, rng: np.random.Generator) -> None:
        """Encode a pool of pictures that ``rng`` draws, as it will the latents."""
        images, self._captions = training_renders(_POOL_IMAGES, rng)
        with torch.no_grad():
            posteriors = [vae.encode(batch).latent_dist for batch in to_pixels(images).split(256)]
        self._mean = torch.cat([posterior.mean for posterior in posteriors])
        self._std = torch.cat([posterior.std for posterior in posteriors])
        self._scale, self._rng = vae.config["scaling_factor"], rng

    def draw(self, count: int) -> tuple[torch.Tensor, list[str]]:
        """Draw scaled latents, float32 [count, C, h, w], and their captions."""
        chosen = self._rng.integers(len(self._captions), size=count)
        # Sampled latents, not means: the model must know the thickness of the manifold (see POSTERIOR_STD).
        noise = torch.randn(count, *self._mean.shape[1:])
        latents = (self._mean[chosen] + self._std[chosen] * noise) * self._scale
        return latents, [self._captions[index] for index in chosen]


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Tokenize texts: int64 [N, L]."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def training_text(caption: str, rng: np.random.Generator) -> str:
    """Empty or corrupt a caption, sometimes."""
    draw = rng.random()
    if draw < DROPPED_SHARE:
        return ""
    return _corrupted(caption, rng) if draw < DROPPED_SHARE + CORRUPTED_SHARE else caption


def _corrupted(caption: str, rng: np.random.Generator) -> str:
    """The caption with one or two attributes drawn anew; never one that is held out."""
    allowed = set(captions_of("train"))
    while True:
        attributes = rng.choice(list(_CHOICES), size=rng.integers(1, 3), replace=False)
        changes = {str(attribute): str(rng.choice(_CHOICES[attribute])) for attribute in attributes}
        changed = dataclasses.replace(scene_of(caption), **changes).caption
        if changed in allowed and changed != caption:
            return changed


def _new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=_HIDDEN,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    """Configure a text encoder of this width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )


def _new_scheduler() -> DDIMScheduler:
    """As in Stable Diffusion 1.5's configuration."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
