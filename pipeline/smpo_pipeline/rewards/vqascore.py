"""VQAScore (arXiv 2404.01291): how likely a vision-language model says "Yes" when asked if an image shows the prompt.

Any model of transformers' AutoModelForImageTextToText with a chat template will do.
Shape suffixes: N images, L tokens, U distinct positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from threading import Lock
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.weights import load_part, load_weights
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.prompts import long_ones_alone
from smpo_pipeline.rewards.networks.weights import fingerprint_folder, model_folder

_QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
_ANSWER = "Yes"


class VqaScore(Reward):
    """P("Yes") over the whole vocabulary, at the first token of the answer.

    The model is a hub id or a folder. Its weights are loaded with the first batch, in the dtype of the job.
    """

    name: ClassVar[str] = "vqascore"
    unit: ClassVar[str] = "probability"
    default_model: ClassVar[str | None] = "Qwen/Qwen2.5-VL-7B-Instruct"
    needs: ClassVar[Needs] = Needs(threads=2, num_gpus=0.75, batch_size=8)

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        self._what = what = f"--reward {self.name}={self.model}"
        self._folder = model_folder(self.model, what)
        config = load_part(AutoConfig.from_pretrained, str(self._folder), what)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise UserError(f"{what} is a {config.model_type!r} model, which does not answer questions about images")
        self._processor = load_part(AutoProcessor.from_pretrained, str(self._folder), what)
        # With or without torchvision installed, images are resized alike.
        self._processor.image_processor = load_part(
            AutoImageProcessor.from_pretrained, str(self._folder), what, backend="pil"
        )
        # What follows a token does not affect it.
        self._processor.tokenizer.padding_side = "right"
        if not self._processor.chat_template:
            raise UserError(f"{what} has no chat template; give a model that was trained to answer questions")
        if "sanitize_control_tokens" not in inspect.signature(self._processor.apply_chat_template).parameters:
            raise UserError(f"--reward {self.name} needs transformers 5.23 or newer; pip install -U transformers")
        self._answer = self._processor.tokenizer.encode(_ANSWER, add_special_tokens=False)[0]
        self._device, self._network = device, None
        self._loading, self._preparing = Lock(), Lock()
        self.fingerprint = sha256_json([fingerprint_folder(self._folder), _QUESTION, _ANSWER])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class."""
        return long_ones_alone(self._score_together, images, prompts)

    def _score_together(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": _ask(prompt)}]}]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        with self._preparing:  # a tokenizer stores its padding setting, so two threads must not call it at once
            inputs = self._processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,
                processor_kwargs={"padding": True},
            ).to(self._device)
        last_N = inputs["attention_mask"].sum(dim=1) - 1
        positions_U, place_N = last_N.unique(return_inverse=True)
        logits_NUV = self._loaded_network()(**inputs, use_cache=False, logits_to_keep=positions_U).logits
        logits_NV = logits_NUV[torch.arange(len(place_N), device=place_N.device), place_N].double()
        return logits_NV.softmax(dim=-1)[:, self._answer].cpu().numpy()

    def _loaded_network(self) -> Any:  # noqa: ANN401  (transformers has no types)
        """Load the weights at the first call: a command needs no copy in memory to know their fingerprint."""
        with self._loading:
            if self._network is None:
                half = torch.is_autocast_enabled(self._device)
                dtype = torch.get_autocast_dtype(self._device) if half else torch.float32
                load = AutoModelForImageTextToText.from_pretrained
                network = load_weights(load, str(self._folder), self._what, dtype=dtype, device_map={"": self._device})
                self._network = network.eval().requires_grad_(False)
        return self._network


def _ask(prompt: str) -> str:
    return _QUESTION.replace("{}", prompt)
