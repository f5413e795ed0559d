"""Human Preference Score v3 (arXiv 2508.03789): Qwen2-VL-7B with a head, trained on HPDv3's comparisons.

The authors' package pins transformers 4.45; this is a loader of its own for their weights.
Shape suffixes: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil

from smpo_common.errors import UserError
from smpo_common.files import sha256_file, sha256_json
from smpo_models.weights import load_part, load_tokenizer
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.hpsv3 import (
    AFTER,
    BEFORE,
    QUESTION,
    REWARD_TOKEN,
    HpsV3Model,
    empty_model,
    load_weights_into,
    pad_right,
    question_tokens,
)
from smpo_pipeline.rewards.networks.prompts import long_ones_alone
from smpo_pipeline.rewards.networks.weights import find_checkpoint

_BASE = "Qwen/Qwen2-VL-7B-Instruct"
_PIXELS = 256 * 28 * 28
"""Every image is resized to about this many pixels."""


class HpsV3(Reward):
    """The mean mu of the score that the model predicts, about -10 to 15.

    The model is a safetensors file, a folder that holds it, or OWNER/REPO/FILE on the hub. Qwen2-VL's config.json,
    preprocessor_config.json and tokenizer are taken from beside it if they are there, else from the hub. Weights are
    loaded with the first batch, in the dtype of the job; the head stays in float32.
    """

    name: ClassVar[str] = "hpsv3"
    unit: ClassVar[str] = "mu"
    default_model: ClassVar[str | None] = "MizzenAI/HPSv3/HPSv3.safetensors"
    needs: ClassVar[Needs] = Needs(threads=2, num_gpus=0.75, batch_size=8)

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        self._checkpoint = find_checkpoint(self.model, what)
        folder = self._checkpoint.parent
        base = str(folder) if (folder / "config.json").is_file() else _BASE
        config = load_part(Qwen2VLConfig.from_pretrained, base, what)
        self._tokenizer = load_tokenizer(AutoTokenizer.from_pretrained, base, what)
        self._tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        size = {"shortest_edge": _PIXELS, "longest_edge": _PIXELS}
        self._processor = load_part(Qwen2VLImageProcessorPil.from_pretrained, base, what, size=size)
        self._network = empty_model(config, self._checkpoint, what)
        self._reward_token = self._tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        if len(self._tokenizer) != config.text_config.vocab_size:
            sizes = f"{len(self._tokenizer)} tokens with {REWARD_TOKEN}, the weights {config.text_config.vocab_size}"
            raise UserError(f"{what}: the tokenizer of {base} has {sizes}")
        self._device, self._loaded = device, False
        self._loading, self._preparing = Lock(), Lock()
        settings = [config.to_diff_dict(), self._processor.to_dict(), BEFORE, QUESTION, AFTER]
        tokens = self._tokenizer.backend_tokenizer.to_str()
        self.fingerprint = sha256_json([sha256_file(self._checkpoint), tokens, *settings])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        return long_ones_alone(self._score_together, images, prompts)

    def _score_together(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        with self._preparing:  # a tokenizer stores its settings, so two threads must not call it at once
            pixels = self._processor(list(images), return_tensors="pt")
            merged = self._processor.merge_size**2
            counts = (pixels["image_grid_thw"].prod(dim=1) // merged).tolist()
            rows = [question_tokens(self._tokenizer, *each) for each in zip(prompts, counts, strict=True)]
        network = self._loaded_network()
        places = torch.tensor([row.index(self._reward_token) for row in rows])
        inputs = {name: value.to(self._device) for name, value in {**pad_right(rows), **pixels}.items()}
        mu_sigma_N2 = network(inputs.pop("input_ids"), places.to(self._device), **inputs)
        return mu_sigma_N2[:, 0].double().cpu().numpy()

    def _loaded_network(self) -> HpsV3Model:
        """Load the weights at the first call: a command needs no copy in memory to know their fingerprint."""
        with self._loading:
            if not self._loaded:
                half = torch.is_autocast_enabled(self._device)
                dtype = torch.get_autocast_dtype(self._device) if half else torch.float32
                load_weights_into(self._network, self._checkpoint, self._device, dtype)
                self._loaded = True
        return self._network
