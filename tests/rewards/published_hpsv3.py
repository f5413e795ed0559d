"""HPSv3 by its authors' package, for an environment with that package and the transformers 4.45 that it pins.

What only training needs (trl, peft, datasets, ...) is not installed there; empty modules stand for it. The model's
forward, the question and the image processing are the package's own.
"""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, __version__

from smpo_pipeline.rewards import Reward

_TRAINING = {
    "trl": ("RewardTrainer", "get_kbit_device_map", "get_quantization_config"),
    "peft": ("PeftModel", "LoraConfig", "get_peft_model"),
    "datasets": ("Dataset",),
    "fire": (),
    "omegaconf": ("OmegaConf",),
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "hidden_act", "max_position_embeddings"),
)
_VISION = (
    *("depth", "embed_dim", "hidden_size", "num_heads", "mlp_ratio", "hidden_act"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size"),
)
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id")


def _config(folder: Path, vocab_size: int) -> Qwen2VLConfig:
    """The folder's config, which today's transformers wrote, in the form of 4.45."""
    given = json.loads((folder / "config.json").read_text())
    text, vision, rope = given["text_config"], given["vision_config"], given["text_config"]["rope_parameters"]
    return Qwen2VLConfig(
        vocab_size=vocab_size,
        vision_config={name: vision[name] for name in _VISION},
        rope_theta=rope["rope_theta"],
        rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]},
        **{name: text[name] for name in _TEXT},
        **{name: given[name] for name in _IDS},
    )


class PublishedHpsV3(Reward):
    """mu by the package's HPSv3RewardInferencer."""

    name = "published"
    unit = f"mu, transformers {__version__}"

    def __init__(self, model: str | None, device: str) -> None:
        for module, names in _TRAINING.items():
            stub: Any = ModuleType(module)
            stub.__spec__, stub.__version__ = ModuleSpec(module, None), "0"
            vars(stub).update({name: type(name, (), {}) for name in names})
            sys.modules[module] = stub
        from hpsv3.inference import HPSv3RewardInferencer
        from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT

        folder = Path(str(model))
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, padding_side="right")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
        config = _config(folder, len(tokenizer))
        config.pad_token_id = tokenizer.pad_token_id
        network = Qwen2VLRewardModelBT(
            config,
            output_dim=2,
            reward_token="special",  # noqa: S106  (not a password)
            special_token_ids=tokenizer.convert_tokens_to_ids(["<|Reward|>"]),
            rm_head_type="ranknet",
        )
        network.load_state_dict(load_file(folder / "HPSv3.safetensors"))
        self._scorer = HPSv3RewardInferencer.__new__(HPSv3RewardInferencer)  # its __init__ downloads the weights
        self._scorer.model, self._scorer.device = network.eval(), device
        self._scorer.processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=_CHAT_TEMPLATE)
        self._scorer.use_special_tokens = True
        self.model, self.fingerprint = str(model), f"transformers {__version__}"

    @torch.inference_mode()
    def score(self, images: Any, prompts: Any) -> np.ndarray:
        return self._scorer.reward(image_paths=list(images), prompts=list(prompts))[:, 0].double().numpy()
