"""The world's flow base: a small model in the layout of Stable Diffusion 3 that often gets the caption wrong."""

from __future__ import annotations

import math
from functools import partial
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.toy_world.autoencoder import LATENT_CHANNELS
from benchmarks.toy_world.base import TrainingLatents, text_config, token_ids, training_text
from benchmarks.toy_world.training import Report, steps

PADDING = 256
"""Zeros in place of T5's tokens, which the pipeline gives to a model without T5."""

SHIFT = 3.0
"""Of the sampler's times, as in Stable Diffusion 3."""

_WIDTHS = (64, 32)
"""Of the two text encoders. Their embeddings lie side by side."""

_HIDDEN = 96
_LAYERS = 4
_BATCH = 64


class PaddingOnce(JointAttnProcessor2_0):
    """Attention to text whose last token stands for :data:`PADDING` equal ones.

    Equal tokens stay equal in every layer, since text has no positions here: one token whose attention logits are
    higher by log(:data:`PADDING`) gives the same result as all of them, in a tenth of the time.
    """

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class."""
        bias = torch.zeros(hidden_states.shape[1] + encoder_hidden_states.shape[1])
        bias[-1] = math.log(PADDING)
        biased = partial(functional.scaled_dot_product_attention, attn_mask=bias.expand(1, 1, len(bias), len(bias)))
        with mock.patch.object(functional, "scaled_dot_product_attention", biased):
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)


def train_flow_base(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, rng: np.random.Generator, num_steps: int, lr: float, report: Report
) -> StableDiffusion3Pipeline:
    """Train a denoiser and its two text encoders on what :func:`toy_world.base.train_base` learns from.

    Noise and times come from torch's global generator.

    Args:
        vae: the trained autoencoder; only its configuration changes, which gets the shift that the pipeline reads.
        tokenizer: the world's; both encoders use it.
        rng: draws the pictures, the captions and their mistakes.
        num_steps: training steps of 64 pictures.
        lr: peak learning rate.
        report: takes progress lines.

    Returns:
        the pipeline of all components, without T5.
    """
    transformer = _new_transformer()
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, width)) for width in _WIDTHS]
    data = TrainingLatents(vae, rng)
    transformer.set_attn_processor(PaddingOnce())
    transformer.train()
    trained = [*transformer.parameters(), *(parameter for encoder in encoders for parameter in encoder.parameters())]
    for make_step in steps("flow base", trained, num_steps, lr, report):
        latents, captions = data.draw(_BATCH)
        tokens = token_ids(tokenizer, [training_text(caption, rng) for caption in captions])
        states = [encoder.train()(tokens, output_hidden_states=True) for encoder in encoders]
        text = torch.cat([state.hidden_states[-2] for state in states], dim=-1)
        noise, time = torch.randn_like(latents), torch.rand(_BATCH)
        sigma = (SHIFT * time / (1 + (SHIFT - 1) * time)).reshape(-1, 1, 1, 1)
        predicted = transformer(
            hidden_states=(1 - sigma) * latents + sigma * noise,
            timestep=1000 * sigma.flatten(),
            encoder_hidden_states=functional.pad(text, (0, 0, 0, 1)),
            pooled_projections=torch.cat([state.text_embeds for state in states], dim=-1),
        ).sample
        make_step((predicted - (noise - latents)).square().mean())
    transformer.set_attn_processor(JointAttnProcessor2_0())
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0].eval(),
        tokenizer=tokenizer,
        text_encoder_2=encoders[1].eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _new_transformer() -> SD3Transformer2DModel:
    """As Stable Diffusion 3.5's, in small."""
    heads = 4
    return SD3Transformer2DModel(
        sample_size=8,
        pos_embed_max_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_LAYERS,
        num_attention_heads=heads,
        attention_head_dim=_HIDDEN // heads,
        caption_projection_dim=_HIDDEN,
        joint_attention_dim=sum(_WIDTHS),
        pooled_projection_dim=sum(_WIDTHS),
        qk_norm="rms_norm",
    )
