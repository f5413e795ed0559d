"""Random models with the layers of published ones; widths can be divided, so that they run on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from benchmarks.page import ROOT

_TOKENIZER = ROOT / "pipeline/smpo_pipeline/toy/assets/model/tokenizer"


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
        shallow: with one layer in the place of two in every block and of up to ten in SDXL's transformers, and two of
            up to 32 in its encoders.
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
        layers_per_block=1 if shallow else 2,
        latent_channels=4,
        norm_num_groups=32 // divide,
        sample_size=8 * side,
    )
    if shape == "sd15":
        return _sd15(vae, scheduler, divide, side, shallow)
    return _sdxl(vae, scheduler, divide, side, shallow)


def _sd15(
    vae: AutoencoderKL, scheduler: DDIMScheduler, divide: int, side: int, shallow: bool
) -> StableDiffusionPipeline:
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=tuple(each // divide for each in (320, 640, 1280, 1280)),
        layers_per_block=1 if shallow else 2,
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
        layers_per_block=1 if shallow else 2,
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


FLUX_BLOCKS = 19
"""Double blocks of FLUX.1; it has twice as many single ones."""


def build_flux(divide: int, blocks: int, *, device: str = "cpu") -> FluxPipeline:
    """Make a FLUX.1-dev with random weights, in float32.

    Args:
        divide: by what all widths are divided: 1, 2, 4 or 8. A head of the transformer keeps its 128 numbers.
        blocks: double blocks in place of 19. The single ones and the layers of the text encoders are divided alike; the
            VAE, which has few layers, has its widths divided once more so that it costs as much less.
        device: of the weights; ``meta`` for none.
    """
    torch.manual_seed(0)
    thinner = divide * (1 if blocks > FLUX_BLOCKS // 2 else 2)
    with torch.device(device):
        transformer = FluxTransformer2DModel(
            num_layers=blocks,
            num_single_layers=2 * blocks,
            num_attention_heads=24 // divide,
            joint_attention_dim=4096 // divide,
            pooled_projection_dim=768 // divide,
            guidance_embeds=True,
        )
        vae = AutoencoderKL(
            block_out_channels=tuple(each // thinner for each in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32 // thinner,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
        clip = CLIPTextModel(_text(768 // divide, round(12 * blocks / FLUX_BLOCKS), max(1, 12 // divide)))
        t5_tokenizer = _t5_tokenizer()
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer),
                d_model=4096 // divide,
                d_kv=64,
                d_ff=10240 // divide,
                num_layers=round(24 * blocks / FLUX_BLOCKS),
                num_heads=64 // divide,
                feed_forward_proj="gated-gelu",
            )
        )
    return FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae, text_encoder=clip, tokenizer=_tokenizer(), text_encoder_2=t5, tokenizer_2=t5_tokenizer,
    )  # fmt: skip


def _t5_tokenizer() -> T5TokenizerFast:
    """Make a tokenizer of single letters; texts are padded to 512 tokens, whatever their length."""
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    letters = [(letter, -5.0) for letter in ("\u2581", *map(chr, range(ord("!"), 127)))]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0)


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
