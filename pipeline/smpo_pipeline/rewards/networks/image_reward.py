"""Adapter for the package ``image-reward`` 1.5, its newest release, which was written for transformers 4.

Why it is needed (upstream: ImageReward's issue 122, open, no release since):

- Importing the package also imports its training code and other scorers, which need ``datasets`` and an undeclared
  ``clip``. Only the scoring files are imported here, under another package name.
- These files import functions that ``transformers.modeling_utils`` moved or removed, and their BERT uses methods that
  ``PreTrainedModel`` removed.
- Importing them silences all warnings and transformers' log for the whole process. Both are restored.
- They download the tokenizer by a fixed hub id and prepare it by a removed method.
- Their image tower has two fixed sizes; here the sizes are read off the weights.
- Their loader ignores missing and misshapen weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BertTokenizer, modeling_utils, pytorch_utils

from smpo_common.errors import UserError
from smpo_models.weights import loading_errors

_PACKAGE = "smpo_image_reward"
_MOVED = ("apply_chunking_to_forward", "prune_linear_layer")
_REMOVED = ("find_pruneable_heads_and_indices",)
_HEAD_WIDTH = 64
_BLOCK = re.compile(r"blip\.visual_encoder\.blocks\.(\d+)\..*")


def build_image_reward(
    state: dict[str, torch.Tensor], med_config: Path, tokenizer: BertTokenizer, what: str, device: str
) -> nn.Module:
    """Build the package's model on ``device``; the state dict must have exactly its weights.

    Args:
        state: weights, by the package's names, in float32.
        med_config: configuration of its BERT.
        tokenizer: BERT's; BLIP's two extra tokens are added to it.
        what: starts the error message.
        device: where the model scores.

    Raises:
        UserError: the package cannot be imported, or the weights are not those of an ImageReward.
    """
    package = _import()
    blip: Any = sys.modules[f"{_PACKAGE}.models.BLIP.blip_pretrain"]
    # As in the authors' tokenizer, these strings in a prompt become the tokens.
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    with loading_errors(f"{what}: {med_config}"):
        vocabulary = json.loads(med_config.read_text(encoding="utf-8")).get("vocab_size")
    if len(tokenizer) != vocabulary:
        raise UserError(f"{what}: the tokenizer has {len(tokenizer)} tokens, {med_config} says {vocabulary}")
    patches = state.get("blip.visual_encoder.patch_embed.proj.weight")
    if patches is None:
        raise UserError(f"{what} is not an ImageReward: it has no image tower (blip.visual_encoder)")
    width, patch = patches.shape[0], patches.shape[-1]
    depth = 1 + max((int(match[1]) for name in state if (match := _BLOCK.fullmatch(name))), default=-1)

    def create_vit(_size: str, image_size: int, *_: object) -> tuple[nn.Module, int]:
        tower = sys.modules[f"{_PACKAGE}.models.BLIP.vit"].VisionTransformer
        heads = max(1, width // _HEAD_WIDTH)
        return tower(image_size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads), width

    blip.create_vit, blip.init_tokenizer = create_vit, lambda: tokenizer
    with loading_errors(f"{what}: {med_config}"):
        model = package.ImageReward(str(med_config), device=device)
    _load_all(model, state, what)
    head = model.mlp.layers

    def exact_head(features_ND: torch.Tensor) -> torch.Tensor:
        # Half precision would round the score itself.
        with torch.autocast(device, enabled=False):
            return head(features_ND.float())

    model.mlp.forward = exact_head
    return model.requires_grad_(False).eval().to(device)


def _load_all(model: nn.Module, state: dict[str, torch.Tensor], what: str) -> None:
    expected = model.state_dict()
    missing = sorted(set(expected) - set(state))
    if missing:
        raise UserError(f"{what} is not an ImageReward: it lacks {len(missing)} weights, first {missing[0]}")
    unknown = sorted(set(state) - set(expected))
    if unknown:
        raise UserError(f"{what} is not an ImageReward: it has {len(unknown)} unknown weights, first {unknown[0]}")
    for name, value in expected.items():
        if state[name].shape != value.shape:
            shapes = f"{list(state[name].shape)} instead of {list(value.shape)}"
            raise UserError(f"{what} is not an ImageReward: {name} is {shapes}")
    model.load_state_dict(state)


@cache
def _import() -> Any:  # noqa: ANN401  (the package has no types)
    """Import the package's module ``ImageReward``; restore the process's warnings, log and other modules."""
    spec = importlib.util.find_spec("ImageReward")
    if not spec or not spec.submodule_search_locations:
        raise UserError(
            "--reward imagereward needs the package image-reward: pip install 'smpo-diffusion[imagereward]'"
        )
    root = Path(spec.submodule_search_locations[0])
    for folder in ("", ".models", ".models.BLIP"):
        # Empty packages instead of the __init__ files, which import what scoring does not need.
        module = types.ModuleType(_PACKAGE + folder)
        module.__path__ = [str(root.joinpath(*folder.split(".")))]
        sys.modules[module.__name__] = module
    verbosity = transformers.logging.get_verbosity()
    try:
        with warnings.catch_warnings(), _old_transformers():
            module = importlib.import_module(f"{_PACKAGE}.ImageReward")
    except (ImportError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"--reward imagereward: the package or what it needs cannot be imported: {first}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    bert = sys.modules[f"{_PACKAGE}.models.BLIP.med"].BertModel
    bert.all_tied_weights_keys = {}
    bert.get_head_mask = _get_head_mask
    bert.invert_attention_mask = _invert_attention_mask
    return module


@contextmanager
def _old_transformers() -> Iterator[None]:
    """Restore moved and removed names of ``transformers.modeling_utils`` during an import."""
    added = [name for name in (*_MOVED, *_REMOVED) if not hasattr(modeling_utils, name)]
    for name in added:
        # The removed function is for pruning; scoring never calls it, so None will do.
        setattr(modeling_utils, name, getattr(pytorch_utils, name, None))
    try:
        yield
    finally:
        for name in added:
            delattr(modeling_utils, name)


def _get_head_mask(_model: nn.Module, head_mask: None, num_hidden_layers: int) -> list[None]:
    """Replace a removed method of transformers; scoring masks no head."""
    return [head_mask] * num_hidden_layers


def _invert_attention_mask(model: Any, mask_NL: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Replace a removed method of transformers: additive attention mask [N, 1, 1, L], 0 or the dtype's minimum."""
    return (1 - mask_NL[:, None, None, :].to(model.dtype)) * torch.finfo(model.dtype).min
