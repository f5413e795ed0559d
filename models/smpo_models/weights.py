"""Weights by hub id or folder, for every kind of model: failures to load them become one line.

Nothing here imports diffusers, which takes longer to import than all that a reward model needs.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from smpo_schemas.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By what ``--dtype`` calls them."""


@contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """Turn what the loading libraries raise for a missing or unfit model into one line."""
    try:
        yield
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, struct.error, AssertionError, OverflowError) as error:
        # The library's own message is a page that offers to run whatever code the file holds.
        raise UserError(f"{what} is damaged, or is no plain file of weights") from error
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise UserError(f"{what} cannot be loaded: {first}") from error


def load_part(loader: Callable[..., Any], source: str | None, what: str, **options: Any) -> Any:  # noqa: ANN401
    """``loader(source, **options)`` (a ``from_pretrained``) with errors in one line; ``what`` names the part."""
    with loading_errors(what):
        return loader(source, **options)


def load_weights(loader: Callable[..., Any], source: str | None, what: str, **options: Any) -> Any:  # noqa: ANN401
    """Like :func:`load_part`, for parts with weights: none of them may be missing from the checkpoint.

    The libraries fill what is missing with random values, and go on. transformers refuses weights of another shape
    without naming one; with ``ignore_mismatched_sizes`` they are refused here, by name.

    Raises:
        UserError: the part cannot be loaded, or its checkpoint is incomplete or of other shapes.
    """
    module, report = load_part(loader, source, what, output_loading_info=True, **options)
    lacking = sorted(report["missing_keys"])
    others = sorted(each[0] for each in report["mismatched_keys"])
    subject = f"{what}: the checkpoint of its {type(module).__name__}"
    if lacking:
        raise UserError(f"{subject} lacks {len(lacking)} weights, first {lacking[0]}")
    if others:
        raise UserError(f"{subject} has {len(others)} weights of another shape, first {others[0]}")
    return module


def load_tokenizer(loader: Callable[..., Any], source: str, what: str, **options: Any) -> Any:  # noqa: ANN401
    """Like :func:`load_part`, for a tokenizer.

    Raises:
        UserError: it cannot be loaded, or is missing, for which the library would make one without words.
    """
    tokenizer = load_part(loader, source, what, **options)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        name = options.get("subfolder", "tokenizer")
        raise UserError(f"{what} cannot be loaded: its {name} is missing or has no vocabulary")
    return tokenizer
