"""Human Preference Score v2 (arXiv 2306.09341) and v2.1: OpenCLIP's ViT-H-14 fine-tuned on human choices.

Its checkpoints are OpenCLIP state dicts.
Shape suffixes: M distinct prompts, N images, D embedding.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import ftfy
import numpy as np
import torch
from PIL import Image
from transformers import CLIPTokenizer

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import load_part
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.open_clip import load_open_clip
from smpo_pipeline.rewards.networks.pixels import normalise
from smpo_pipeline.rewards.networks.weights import find_checkpoint, read_checkpoint

_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HpsV2(Reward):
    """Raw cosine of image and prompt, as the authors report it; some papers report 100 times this."""

    name: ClassVar[str] = "hpsv2"
    unit: ClassVar[str] = "cosine"
    default_model: ClassVar[str | None] = "xswu/HPSv2/HPS_v2_compressed.pt"
    needs: ClassVar[Needs] = Needs(threads=2)

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        checkpoint = find_checkpoint(self.model, what)
        own = any((checkpoint.parent / file).is_file() for file in ("tokenizer.json", "vocab.json"))
        self._tokenizer = load_part(CLIPTokenizer.from_pretrained, str(checkpoint.parent) if own else _TOKENIZER, what)
        # A tokenizer stores its padding setting, so two threads must not call it at once.
        self._tokenizing = Lock()
        loaded = load_open_clip(read_checkpoint(checkpoint, what), what)
        config = loaded.config
        if len(self._tokenizer) != config.text_config.vocab_size:
            sizes = f"the tokenizer has {len(self._tokenizer)} tokens, the checkpoint {config.text_config.vocab_size}"
            raise UserError(f"{what}: {sizes}")
        self._side = config.vision_config.image_size
        self._max_tokens = config.text_config.max_position_embeddings
        self._clip = loaded.requires_grad_(False).eval().to(device)
        self._device = device
        self.fingerprint = sha256_json([fingerprint_module(loaded), self._tokenizer.backend_tokenizer.to_str()])

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
            )
        # OpenCLIP pads with 0 and masks nothing: attention is causal, so padding does not affect the text's tokens.
        padded = (tokens.input_ids * tokens.attention_mask).to(self._device)
        text_MD = self._clip.get_text_features(input_ids=padded).pooler_output.double()
        text_ND = text_MD[[rows[prompt] for prompt in prompts]]
        return torch.nn.functional.cosine_similarity(image_ND, text_ND).cpu().numpy()


def clean(prompt: str) -> str:
    """Clean a prompt as OpenCLIP does before its tokenizer: fix broken Unicode, decode HTML entities."""
    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def fit_into_square(image: Image.Image, side: int) -> torch.Tensor:
    """Resize the longer side to ``side`` (bicubic, antialiased, not clipped to [0, 1]), pad with black, standardise.

    The same as HPSv2's transform with torchvision 0.17 or newer; older versions did not antialias tensors, and gave
    other scores. HPSv2's transform fails where the longer side already has the right length; here it is padded.

    Returns:
        Float32 [3, side, side].
    """
    width, height = image.size
    scale = side / max(width, height)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    values_hw3 = np.asarray(image)
    pixels_3hw = torch.zeros(3, side, side)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    for channel in range(3):  # one at a time, to save memory: float32 takes four times the bytes of the pixels
        plane_11hw = torch.from_numpy(values_hw3[..., channel].copy())[None, None].float() / 255
        if scale != 1:
            plane_11hw = torch.nn.functional.interpolate(
                plane_11hw, (new_height, new_width), mode="bicubic", align_corners=False, antialias=True
            )
        pixels_3hw[channel, top : top + new_height, left : left + new_width] = plane_11hw[0, 0]
    return normalise(pixels_3hw)
