"""The model and the question of HPSv3 (arXiv 2508.03789), as its authors' package (hpsv3 1.0.0, MIT licence) has them.

The model is Qwen2-VL without its language head; a small head reads the state of the token ``<|Reward|>``, which is the
first one after the base model's vocabulary.
Shape suffixes: N images, L tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from smpo_common.errors import UserError
from smpo_models.weights import loading_errors

REWARD_TOKEN = "<|Reward|>"  # noqa: S105  (not a password)

_EMBEDDING = "language_model.embed_tokens.weight"
_HEAD = "rm_head."
_UNUSED = "lm_head."

# Qwen2-VL's chat template around one image and one text.
BEFORE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>"
)
AFTER = f"{REWARD_TOKEN}\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"

# Each blank of the authors' text counts, also those at the ends of lines.
QUESTION = """
You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall \
score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being the \
best.\x20

**Visual Quality:** \x20
Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:
- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal body \
structures or nonsensical environmental setups.
- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret, \
with no blurring or indistinct areas.
- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements (e.g., \
hair, clothing, shadows).
- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition, \
atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and balance.
- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult \
material. If such content is present, the image quality and satisfaction score should be the lowest possible.\x20

**Text Alignment:** \x20
Assess how well the image matches the textual prompt across the following sub-dimensions:
- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align with \
the textual description. The subject should match the description in terms of number, appearance, and behavior.
- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the image \
adheres to this style.
- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image logically \
fit the scenario described in the prompt. The environment should support and enhance the subject without contradictions.
- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, accessories, \
expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, but critical \
attributes should be preserved.
- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image. The \
generated content should not introduce elements that conflict with or distort the original description.
Textual prompt - {prompt}



Please provide the overall ratings of this image:\x20"""


class HpsV3Model(nn.Module):
    """Qwen2-VL and the head; :meth:`forward` returns the mean mu and the raw deviation sigma of the score."""

    def __init__(self, config: Qwen2VLConfig) -> None:
        super().__init__()
        self.base = Qwen2VLModel(config)
        # The authors' dropout after the first ReLU has no weights; the names of the layers count it.
        self.head = nn.ModuleDict(
            {"0": nn.Linear(config.text_config.hidden_size, 1024), "3": nn.Linear(1024, 16), "5": nn.Linear(16, 2)}
        )

    def forward(self, input_ids_NL: torch.Tensor, reward_place_N: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Return mu and sigma, float32 [N, 2].

        Args:
            input_ids_NL: tokens, padded on the right.
            reward_place_N: position of the reward token.
            inputs: attention mask, pixels and grid, as Qwen2-VL takes them.
        """
        count, length = input_ids_NL.shape
        # The authors call the language model without an image's grid: it counts image tokens as it counts words, and
        # does not use the two-dimensional positions that Qwen2-VL itself gives them.
        positions_3NL = torch.arange(length, device=input_ids_NL.device).expand(3, count, length)
        states_NLD = self.base(
            input_ids=input_ids_NL, position_ids=positions_3NL, use_cache=False, **inputs
        ).last_hidden_state
        values = states_NLD[torch.arange(count, device=states_NLD.device), reward_place_N].float()
        with torch.autocast(values.device.type, enabled=False):
            for name, layer in self.head.items():
                values = layer(values if name == "0" else values.relu())
        return values


def model_key(name: str) -> str | None:
    """Translate a weight's name in the checkpoint to one of :class:`HpsV3Model`; None for the unused language head.

    transformers named the parts ``visual`` and ``model`` when HPSv3 was trained (4.45), and names them ``model.visual``
    and ``model.language_model`` since 4.52.
    """
    if name.startswith(_UNUSED):
        return None
    if name.startswith(_HEAD):
        return f"head.{name.removeprefix(_HEAD)}"
    rest = name.removeprefix("model.")
    part = "" if rest.startswith(("visual.", "language_model.")) else "language_model."
    return f"base.{part}{rest}"


def empty_model(config: Qwen2VLConfig, checkpoint: Path, what: str) -> HpsV3Model:
    """Build the model that a checkpoint is of, without weights.

    Raises:
        UserError: the checkpoint is of another architecture, or not complete.
    """
    with loading_errors(f"{what}: {checkpoint}"), safe_open(checkpoint, "pt") as file:
        found = {key: file.get_slice(name).get_shape() for name in file.keys() if (key := model_key(name))}  # noqa: SIM118
    rows = found.get(f"base.{_EMBEDDING}", [0])[0]
    config.text_config.vocab_size = rows  # the authors cut it to their tokenizer's length
    with init_empty_weights(include_buffers=False):
        model = HpsV3Model(config)
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{what}: {checkpoint} is not HPSv3 on this Qwen2-VL: {name} has the shape {found.get(name)}, expected "
                f"{wanted.get(name)}"
            )
    return model.eval().requires_grad_(False)


def load_weights_into(model: HpsV3Model, checkpoint: Path, device: str, dtype: torch.dtype) -> None:
    """Load a checkpoint onto a device; the head stays in float32, as the authors have it."""
    with safe_open(checkpoint, "pt", device=device) as file:
        for name in file.keys():  # noqa: SIM118  (no mapping)
            key = model_key(name)
            if key is None:
                continue
            module, _, parameter = key.rpartition(".")
            value = file.get_tensor(name).to(torch.float32 if key.startswith("head.") else dtype)
            setattr(model.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))
    model.to(device)


def question_tokens(tokenizer: Any, prompt: str, num_image_tokens: int) -> list[int]:  # noqa: ANN401  (no types)
    """Tokenize the question about an image; special tokens in the prompt are text."""
    before, image, after = re.split(r"(<\|image_pad\|>)", BEFORE)
    text = tokenizer(QUESTION.replace("{prompt}", prompt), add_special_tokens=False, split_special_tokens=True)
    rest = tokenizer([before, image, after, AFTER], add_special_tokens=False)
    first, pad, second, last = rest.input_ids
    return [*first, *(pad * num_image_tokens), *second, *text.input_ids, *last]


def pad_right(rows: list[list[int]]) -> Mapping[str, torch.Tensor]:
    """Make int64 [N, L] ``input_ids`` and ``attention_mask`` of token lists; what the padding is does not matter."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
    }
