"""Human Preference Score v2 (arXiv 2306.09341) and v2.1: OpenCLIP's ViT-H-14 fine-tuned on human choices.

Its checkpoints are OpenCLIP state dicts. They are loaded into transformers' CLIPModel, name by name.
Shape suffixes: M distinct prompts, N images, D embedding.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import ftfy
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from smpo_models.fingerprint import fingerprint_module
from smpo_models.loading import load_part, load_weights
from smpo_pipeline.rewards._pixels import normalise
from smpo_pipeline.rewards._weights import find_checkpoint, read_checkpoint
from smpo_pipeline.rewards.base import Reward
from smpo_schemas.errors import UserError
from smpo_schemas.files import sha256_json

_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_NUM_HEADS = 16
"""Of both towers of ViT-H-14; the one number that a state dict does not tell."""
_PROPORTIONS = (5, 4, 4)
"""Widths of ViT-H-14's image tower, text tower and embedding: 1280, 1024, 1024. No other OpenCLIP model has them."""

_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(\w+(?:\.\w+)?)[._](weight|bias)")
_BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class HpsV2(Reward):
    """Raw cosine of image and prompt; the authors print the same number (some papers 100 times it)."""

    name: ClassVar[str] = "hpsv2"
    unit: ClassVar[str] = "cosine"
    default_model: ClassVar[str | None] = "xswu/HPSv2/HPS_v2_compressed.pt"

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        checkpoint = find_checkpoint(self.model, what)
        own = any((checkpoint.parent / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        self._tokenizer = load_part(CLIPTokenizer.from_pretrained, str(checkpoint.parent) if own else _TOKENIZER, what)
        # A tokenizer keeps its padding as state, which two threads may not set at once.
        self._tokenizing = Lock()
        state = read_checkpoint(checkpoint, what)
        config = _config(state, what)
        loaded = load_weights(
            CLIPModel.from_pretrained,
            None,
            what,
            config=config,
            state_dict=_renamed(state, what),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
        if len(self._tokenizer) != config.text_config.vocab_size:
            known, needed = len(self._tokenizer), config.text_config.vocab_size
            raise UserError(f"{what}: the tokenizer knows {known} tokens, the checkpoint {needed}")
        self._side = config.vision_config.image_size
        self._max_tokens = config.text_config.max_position_embeddings
        self._clip = loaded.requires_grad_(False).eval().to(device)
        self._device = device
        self.fingerprint = sha256_json([fingerprint_module(loaded), self._tokenizer.get_vocab()])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        pixels = torch.stack([fit_into_square(image, self._side) for image in images]).to(self._device)
        image_ND = self._clip.get_image_features(pixel_values=pixels).pooler_output.double()
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        with self._tokenizing:
            tokens = self._tokenizer(
                [clean(prompt) for prompt in rows],
                padding="max_length",
                truncation=True,
                max_length=self._max_tokens,
                split_special_tokens=True,
                return_tensors="pt",
            ).input_ids.to(self._device)
        text_MD = self._clip.get_text_features(input_ids=tokens).pooler_output.double()
        text_ND = text_MD[[rows[prompt] for prompt in prompts]]
        return torch.nn.functional.cosine_similarity(image_ND, text_ND).cpu().numpy()


def clean(prompt: str) -> str:
    """OpenCLIP's cleaning before its tokenizer: broken Unicode and HTML entities mended."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def fit_into_square(image: Image.Image, side: int) -> torch.Tensor:
    """Longer side to ``side`` (bicubic, antialiased, on values and without clipping), black borders, standardised.

    As HPSv2's own transform does with torchvision 0.17 or newer. Older ones did not antialias tensors, and gave
    another number. An image whose longer side is right already gets its borders too; there, theirs fails.

    Returns:
        Float32 [3, side, side].
    """
    width, height = image.size
    scale = side / max(width, height)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    values_hw3 = np.asarray(image)
    pixels_3hw = torch.zeros(3, side, side)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    for channel in range(3):  # one at a time: of a large image, the values take four times the bytes of the pixels
        plane_11hw = torch.from_numpy(values_hw3[..., channel].copy())[None, None].float() / 255
        if scale != 1:
            plane_11hw = torch.nn.functional.interpolate(
                plane_11hw, (new_height, new_width), mode="bicubic", align_corners=False, antialias=True
            )
        pixels_3hw[channel, top : top + new_height, left : left + new_width] = plane_11hw[0, 0]
    return normalise(pixels_3hw)


def _config(state: dict[str, torch.Tensor], what: str) -> CLIPConfig:
    """Read off all sizes from the shapes of the weights."""
    needed = ("token_embedding.weight", "positional_embedding", "text_projection", "visual.conv1.weight", "visual.proj")
    lacking = [name for name in (*needed, "visual.positional_embedding") if name not in state]
    if lacking:
        raise UserError(f"{what} is no OpenCLIP state dict: it has no {lacking[0]}")
    vocabulary, text_width = state["token_embedding.weight"].shape
    width, embedding = state["visual.proj"].shape
    unit = width // _PROPORTIONS[0]
    if (width, text_width, embedding) != tuple(unit * part for part in _PROPORTIONS):
        widths = f"{width}, {text_width} and {embedding}"
        raise UserError(f"{what} is no ViT-H-14: widths of image tower, text tower and embedding are {widths}")
    patch = state["visual.conv1.weight"].shape[-1]
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    blocks = [match for name in state if (match := _BLOCK.fullmatch(name))]
    depths = {tower: 1 + max((int(each[2]) for each in blocks if each[1] == tower), default=-1) for tower in _TOWERS}
    shared = {"num_attention_heads": _NUM_HEADS, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": depths[None],
            "max_position_embeddings": len(state["positional_embedding"]),
            # 2 means: the embedding of a text is at its highest token, which is how OpenCLIP finds its end.
            "eos_token_id": 2,
            **shared,
        },
        vision_config={
            "image_size": grid * patch,
            "patch_size": patch,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depths["visual."],
            **shared,
        },
        projection_dim=embedding,
    )


_TOWERS = {None: "text_model", "visual.": "vision_model"}


def _renamed(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """The weights under transformers' names: the fused attention inputs split, the projections turned round."""
    renamed = {}
    for name, value in state.items():
        match = _BLOCK.fullmatch(name)
        if name in _NAMES:
            renamed[_NAMES[name]] = value.T if name in _TRANSPOSED else value
        elif match and match[3] == "attn.in_proj":
            layer = f"{_TOWERS[match[1]]}.encoder.layers.{match[2]}.self_attn"
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.{part}_proj.{match[4]}"] = third
        elif match and match[3] in _BLOCK_NAMES:
            layer = f"{_TOWERS[match[1]]}.encoder.layers.{match[2]}"
            renamed[f"{layer}.{_BLOCK_NAMES[match[3]]}.{match[4]}"] = value
        else:
            raise UserError(f"{what} is no ViT-H-14: it has a weight called {name}")
    # transformers stores rows of memory as they are; a transposed view would be hashed and moved slowly.
    return {name: value.contiguous() for name, value in renamed.items()}
