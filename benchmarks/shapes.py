"""Random models with the layers of published ones; widths can be divided, so that they run on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_TOKENIZER = Path(__file__).parents[1] / "pipeline/smpo_pipeline/toy/assets/model/tokenizer"


@dataclass(frozen=True)
class Shape:
    """A published model's shape, and how the published scripts train it.

    Attributes:
        name: on the page.
        grid: nodes of the published inversion.
        beta: the published value.
        pairs: batch size that two CPU cores process in seconds.
    """

    name: str
    grid: int
    beta: float
    pairs: int


SHAPES = {"sd15": Shape("Stable Diffusion 1.5", 5, 2000.0, 2), "sdxl": Shape("Stable Diffusion XL", 10, 5000.0, 1)}


def make_model(path: Path, shape: str, divide: int, side: int) -> None:
    """Write the folder of a model from :func:`build_model`."""
    build_model(shape, divide, side).save_pretrained(path)


def build_model(
    shape: str,
    divide: int,
    side: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    shallow: bool = False,
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Make a whole pipeline with random weights.

    Args:
        shape: ``sd15`` or ``sdxl``.
        divide: by what all widths are divided.
        side: of the latents, in latent pixels.
        device: where the weights are drawn; of a full-size model a GPU does it in a second.
        dtype: to which they are cast.
        shallow: with one layer in the place of up to ten in SDXL's transformers, and two of up to 32 in its encoders.
    """
    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    with torch.device(device):
        pipeline = _pipeline(shape, scheduler, divide, side, shallow)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(dtype)
    return pipeline


def _pipeline(
    shape: str, scheduler: DDIMScheduler, divide: int, side: int, shallow: bool
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    vae = AutoencoderKL(
        block_out_channels=tuple(each // divide for each in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 // divide,
        sample_size=8 * side,
    )
    if shape == "sd15":
        return _sd15(vae, scheduler, divide, side)
    return _sdxl(vae, scheduler, divide, side, shallow)


def _sd15(vae: AutoencoderKL, scheduler: DDIMScheduler, divide: int, side: int) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=tuple(each // divide for each in (320, 640, 1280, 1280)),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=768 // divide,
        attention_head_dim=8,
        norm_num_groups=32 // divide,
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(_text(768 // divide, 12, 12 // divide)), tokenizer=_tokenizer(), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(
    vae: AutoencoderKL, scheduler: DDIMScheduler, divide: int, side: int, shallow: bool
) -> StableDiffusionXLPipeline:
    pooled, time = 1280 // divide, 256 // divide
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=tuple(each // divide for each in (320, 640, 1280)),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        transformer_layers_per_block=(1, 1, 1) if shallow else (1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048 // divide,
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + pooled,
        use_linear_projection=True,
        norm_num_groups=32 // divide,
    )
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(_text(768 // divide, 2 if shallow else 12, 12 // divide)),
        text_encoder_2=CLIPTextModelWithProjection(_text(pooled, 2 if shallow else 32, 20 // divide)),
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=77)


def _text(width: int, layers: int, heads: int) -> CLIPTextConfig:
    tokenizer = _tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
