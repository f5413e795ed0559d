"""Convert an OpenCLIP ViT-H-14 state dict to a transformers CLIPModel."""

from __future__ import annotations

import math
import re

import torch
from transformers import CLIPConfig, CLIPModel

from smpo_common.errors import UserError
from smpo_models.weights import load_weights, loading_errors

_NUM_HEADS = 16
"""Number of attention heads of both towers: the only size that the weights' shapes do not give."""
_PROPORTIONS = (5, 4, 4)
"""Proportions of the widths of image tower, text tower and embedding (1280, 1024, 1024), which identify ViT-H-14."""

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
_TOWERS = {None: "text_model", "visual.": "vision_model"}


def load_open_clip(state: dict[str, torch.Tensor], what: str) -> CLIPModel:
    """Build the model; the state dict must have exactly its weights.

    Args:
        state: an OpenCLIP state dict, in float32.
        what: starts the error message.

    Raises:
        UserError: the weights are not those of a ViT-H-14.
    """
    with loading_errors(what):  # a hostile weight may have too few dimensions
        config, renamed = _config(state, what), _renamed(state, what)
    return load_weights(
        CLIPModel.from_pretrained,
        None,
        what,
        config=config,
        state_dict=renamed,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )


def _config(state: dict[str, torch.Tensor], what: str) -> CLIPConfig:
    """Derive all sizes from the shapes of the weights."""
    needed = ("token_embedding.weight", "positional_embedding", "text_projection", "visual.conv1.weight", "visual.proj")
    missing = [name for name in (*needed, "visual.positional_embedding") if name not in state]
    if missing:
        raise UserError(f"{what} is not an OpenCLIP state dict: it has no {missing[0]}")
    vocabulary, text_width = state["token_embedding.weight"].shape
    width, embedding = state["visual.proj"].shape
    unit = width // _PROPORTIONS[0]
    if (width, text_width, embedding) != tuple(unit * part for part in _PROPORTIONS):
        widths = f"{width}, {text_width} and {embedding}"
        raise UserError(f"{what} is not a ViT-H-14: the widths of image tower, text tower and embedding are {widths}")
    patch = state["visual.conv1.weight"].shape[-1]
    grid = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    blocks = [match for name in state if (match := _BLOCK.fullmatch(name))]
    depths = {tower: 1 + max((int(match[2]) for match in blocks if match[1] == tower), default=-1) for tower in _TOWERS}
    shared = {"num_attention_heads": _NUM_HEADS, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": 4 * text_width,
            "num_hidden_layers": depths[None],
            "max_position_embeddings": len(state["positional_embedding"]),
            # With 2, transformers takes a text's embedding at its highest token id, as OpenCLIP does.
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


def _renamed(state: dict[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Rename the weights as transformers does, split fused attention inputs and transpose projections."""
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
            raise UserError(f"{what} is not a ViT-H-14: it has a weight called {name}")
    # Hashing and moving a transposed view would be slow.
    return {name: value.contiguous() for name, value in renamed.items()}
