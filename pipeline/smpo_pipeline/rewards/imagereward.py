"""ImageReward (arXiv 2304.05977): BLIP fine-tuned on experts' comparisons, through the authors' package.

Shape suffixes: M distinct prompts, N images, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer

from smpo_common.errors import UserError
from smpo_common.files import sha256_json
from smpo_models.fingerprint import fingerprint_module
from smpo_models.weights import load_part
from smpo_pipeline.rewards._image_reward import build_image_reward
from smpo_pipeline.rewards._weights import find_checkpoint, hub_file, read_checkpoint
from smpo_pipeline.rewards.base import Needs, Reward

_TOKENIZER = "google-bert/bert-base-uncased"
_CONFIG_FILE = "med_config.json"
_MAX_TOKENS = 35


class ImageReward(Reward):
    """The package's ``score``: the head's output less its mean over the authors' data, by its standard deviation.

    The model is a folder that holds the checkpoint, ``med_config.json`` and BERT's tokenizer, or the checkpoint's file
    in such a folder, or OWNER/REPO/FILE on the hub. Without a tokenizer there, BERT's own from the hub is used.
    """

    name: ClassVar[str] = "imagereward"
    unit: ClassVar[str] = "standard deviations of the authors' data"
    default_model: ClassVar[str | None] = "THUDM/ImageReward/ImageReward.pt"
    needs: ClassVar[Needs] = Needs(num_cpus=2)

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        checkpoint = find_checkpoint(self.model, what)
        folder, config = checkpoint.parent, checkpoint.parent / _CONFIG_FILE
        if not config.is_file():
            if Path(self.model).exists():
                raise UserError(f"{what}: {_CONFIG_FILE} is not in {folder}; it belongs beside the checkpoint")
            config = hub_file(f"{self.model.rpartition('/')[0]}/{_CONFIG_FILE}", what)
        own = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt"))
        tokenizer = load_part(BertTokenizer.from_pretrained, str(folder) if own else _TOKENIZER, what)
        loaded = build_image_reward(read_checkpoint(checkpoint, what), config, tokenizer, what, device)
        self._model = loaded
        self._tokenizer = tokenizer
        # A tokenizer keeps its padding as state, which two threads may not set at once.
        self._tokenizing = Lock()
        self._device = device
        settings = config.read_text(encoding="utf-8")
        self.fingerprint = sha256_json([fingerprint_module(loaded), settings, tokenizer.backend_tokenizer.to_str()])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class. The text is encoded under each image, by design: only its tokens are shared."""
        pixels = torch.stack([self._model.preprocess(image) for image in images]).to(self._device)
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        with self._tokenizing:
            tokens = self._tokenizer(
                list(rows), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            ).to(self._device)
        chosen = [rows[prompt] for prompt in prompts]
        scores_N1 = self._model.score_gard(tokens.input_ids[chosen], tokens.attention_mask[chosen], pixels)
        return scores_N1.squeeze(1).double().cpu().numpy()
