"""Tiny random vision-language models of the real classes, in folders as published ones; made without the network."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AddedToken,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
)

from tests.tiny.language import LANGUAGE_WIDTH, make_qwen_tokenizer, make_qwen_vl

_IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_vision_tokenizer() -> Qwen2Tokenizer:
    tokenizer = make_qwen_tokenizer(words=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in _IMAGE_TOKENS])
    return tokenizer


def qwen2_vl_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    start, _, image, video = (tokenizer.convert_tokens_to_ids(token) for token in _IMAGE_TOKENS)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": LANGUAGE_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": LANGUAGE_WIDTH, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=start, image_token_id=image, video_token_id=video
    )


_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The part of Qwen2-VL's and Qwen2.5-VL's that one question needs."""


def make_tiny_vlm(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen2.5-VL with its processor."""
    tokenizer = make_vision_tokenizer()
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_CHAT_TEMPLATE
    )
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_qwen_vl(tokenizer)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn_like(parameter) * 0.25
        # The answer's first token is a letter here, likely or unlikely by the image and the prompt.
        model.lm_head.weight.data[tokenizer.encode("Yes")[0]] *= 5
    start, _, image, video = (tokenizer.convert_tokens_to_ids(token) for token in _IMAGE_TOKENS)
    model.config.vision_start_token_id, model.config.image_token_id, model.config.video_token_id = start, image, video
    model.save_pretrained(folder)
    return folder


def hpsv3_head(width: int = LANGUAGE_WIDTH) -> nn.Sequential:
    """The head as its authors define it."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def make_tiny_hpsv3(folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with the names of transformers 4.45, and Qwen2-VL's config, tokenizer and processor."""
    tokenizer = make_vision_tokenizer()
    tokenizer.save_pretrained(folder)
    config = qwen2_vl_config(tokenizer)
    config.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
        model.resize_token_embeddings(len(tokenizer) + 1, mean_resizing=False)
        head = hpsv3_head()
        for parameter in model.parameters():  # as they are drawn, states hardly depend on the input
            if parameter.ndim > 1:
                parameter.data = torch.randn_like(parameter) * 0.25
        for layer in (head[0], head[3], head[5]):
            layer.weight.data *= 3
    state = {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    for name, value in model.state_dict().items():
        old = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[old] = value.clone().contiguous()
    save_file(state, folder / "HPSv3.safetensors")
    return folder
