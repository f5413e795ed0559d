"""Tiny random Stable Diffusions (1.x, XL) in the diffusers folder layout, made in a second, without the network.

Latents are 4 x 8 x 8, images 32 x 32. Its text encoder takes any unicode text.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

LATENT_SHAPE = (4, 8, 8)
IMAGE_SIDE = 32

_TEXT_WIDTH = 32
_POOLED_WIDTH = 16
_MAX_TOKENS = 24
_LEVELS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_MERGES = (("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("a", "n"), ("an", "d</w>"))


def make_tiny_model(path: Path, prediction_type: str = "epsilon", seed: int = 0, text_width: int = _TEXT_WIDTH) -> Path:
    """Write the model folder; the same seed gives the same weights. Returns ``path``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = make_tiny_unet(cross_attention_dim=text_width)
        tokenizer = make_tokenizer()
        text_encoder = CLIPTextModel(make_text_config(tokenizer, hidden_size=text_width))
        vae = make_tiny_vae()
    scheduler = DDIMScheduler(
        **_LEVELS,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def put_scheduler(folder: Path, kind: type[SchedulerMixin], **settings) -> Path:
    """Give a model folder another scheduler of the same noise levels."""
    kind(**_LEVELS, **settings).save_pretrained(folder / "scheduler")
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scheduler": ["diffusers", kind.__name__]}))
    return folder


def make_tiny_xl(path: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """The same for Stable Diffusion XL, with the kind of scheduler that the published model comes with."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = make_tiny_unet(
            cross_attention_dim=2 * _TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _POOLED_WIDTH,
        )
        tokenizer = make_tokenizer()
        text_encoder = CLIPTextModel(make_text_config(tokenizer))
        text_encoder_2 = CLIPTextModelWithProjection(make_text_config(tokenizer, hidden_act="gelu"))
        vae = make_tiny_vae(scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(**_LEVELS, timestep_spacing="leading", prediction_type=prediction_type)
    # The published config holds what other schedulers need, too.
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False, skip_prk_steps=True)
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(padded_with="!"),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    ).save_pretrained(path)
    return path


def make_text_config(tokenizer: CLIPTokenizer, **more) -> CLIPTextConfig:
    sizes = {"hidden_size": _TEXT_WIDTH, **more}
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=_POOLED_WIDTH,
        max_position_embeddings=_MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def make_tiny_vae(blocks: int = 3, **more) -> AutoencoderKL:
    """A random autoencoder, from torch's global generator; each block but one halves the sides."""
    config = {"latent_channels": LATENT_SHAPE[0], "norm_num_groups": 4, **more}
    return AutoencoderKL(
        block_out_channels=(8, 16, 16)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        sample_size=IMAGE_SIDE,
        **config,
    )


def make_tiny_unet(**more) -> UNet2DConditionModel:
    """A random denoiser, from torch's global generator."""
    config = {"cross_attention_dim": _TEXT_WIDTH, **more}
    return UNet2DConditionModel(
        sample_size=LATENT_SHAPE[-1],
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        **config,
    )


def make_tokenizer(padded_with: str = _END) -> CLIPTokenizer:
    """All 256 bytes, within and at the end of a word, and a few merges."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + _WORD_END for letter in letters), *("".join(pair) for pair in _MERGES), _START, _END]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in _MERGES)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n")
        special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": padded_with}
        return CLIPTokenizer.from_pretrained(folder, **special, model_max_length=_MAX_TOKENS)


def make_tiny_clip(path: Path, seed: int = 0, image_size: int = 32) -> Path:
    """Write a tiny random reward model in the PickScore layout (CLIPModel, image processor, tokenizer)."""
    tokenizer = make_tokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={"vocab_size": len(tokenizer), "max_position_embeddings": _MAX_TOKENS, **sizes, **ids},
        vision_config={"image_size": image_size, "patch_size": 8, **sizes},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(path)
    side = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
