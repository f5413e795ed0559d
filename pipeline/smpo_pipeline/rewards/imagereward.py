"""ImageReward (arXiv 2304.05977): BLIP fine-tuned on experts' comparisons, run by the authors' package.

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
from smpo_pipeline.rewards.base import Needs, Reward
from smpo_pipeline.rewards.networks.image_reward import build_image_reward
from smpo_pipeline.rewards.networks.weights import find_checkpoint, hub_file, read_checkpoint

_TOKENIZER = "google-bert/bert-base-uncased"
_CONFIG_FILE = "med_config.json"
_MAX_TOKENS = 35


class ImageReward(Reward):
    """The package's score: the head's output, standardised by mean and deviation over the authors' data.

    The model is a folder with the checkpoint, ``med_config.json`` and BERT's tokenizer, or the checkpoint file in such
    a folder, or OWNER/REPO/FILE on the hub. Without a tokenizer beside the checkpoint, BERT's from the hub is used.
    """

    name: ClassVar[str] = "imagereward"
    unit: ClassVar[str] = "standard deviations of the authors' data"
    default_model: ClassVar[str | None] = "THUDM/ImageReward/ImageReward.pt"
    needs: ClassVar[Needs] = Needs(threads=2)

    def __init__(self, model: str | None, device: str) -> None:
        self.model = model or str(self.default_model)
        what = f"--reward {self.name}={self.model}"
        checkpoint = find_checkpoint(self.model, what)
        folder, config = checkpoint.parent, checkpoint.parent / _CONFIG_FILE
        if not config.is_file():
            if Path(self.model).exists():
                raise UserError(f"{what}: {folder} has no {_CONFIG_FILE}; put it beside the checkpoint")
            config = hub_file(f"{self.model.rpartition('/')[0]}/{_CONFIG_FILE}", what)
        own = any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt"))
        tokenizer = load_part(BertTokenizer.from_pretrained, str(folder) if own else _TOKENIZER, what)
        loaded = build_image_reward(read_checkpoint(checkpoint, what), config, tokenizer, what, device)
        self._model = loaded
        self._tokenizer = tokenizer
        # A tokenizer stores its padding setting, so two threads must not call it at once.
        self._tokenizing = Lock()
        self._device = device
        settings = config.read_text(encoding="utf-8")
        self.fingerprint = sha256_json([fingerprint_module(loaded), settings, tokenizer.backend_tokenizer.to_str()])

    @torch.inference_mode()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """See the base class. The model encodes the text together with each image; only the tokens are shared."""
        pixels = torch.stack([self._model.preprocess(image) for image in images]).to(self._device)
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        with self._tokenizing:
            tokens = self._tokenizer(
                list(rows), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            ).to(self._device)
        row_N = [rows[prompt] for prompt in prompts]
        scores_N1 = self._model.score_gard(tokens.input_ids[row_N], tokens.attention_mask[row_N], pixels)
        return scores_N1.squeeze(1).double().cpu().numpy()
