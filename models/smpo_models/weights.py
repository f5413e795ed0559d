"""Load weights by hub id or folder, for every kind of model; a failure becomes a one-line error.

Nothing here imports diffusers, which takes longer to import than all that a reward model needs.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smpo_common.errors import UserError
from smpo_models.hub import part_on_disk, require_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by their names in ``--dtype``."""

_IN_FILES = {torch.bfloat16: "BF16", torch.float16: "F16"}
"""Dtypes by their names in safetensors files."""


@contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """Turn errors that the libraries raise for a missing or unsuitable model into a one-line :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, struct.error, AssertionError, OverflowError) as error:
        # The library's own message is a page that offers to run whatever code the file holds.
        raise UserError(f"{what} is damaged, or is no plain file of weights") from error
    except (
        *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError),
        ImportError,  # of a package that only some models need
    ) as error:
        first, *more = str(error).strip().split("\n")
        # torch's second line names the weight that does not fit.
        first += f" {more[0].strip()}" if first.endswith(":") and more else ""
        raise UserError(f"{what} cannot be loaded: {first[:300]}") from error


def load_part(loader: Callable[..., Any], source: str | None, what: str, **options: Any) -> Any:  # noqa: ANN401
    """Call ``loader(source, **options)`` (a ``from_pretrained``) with one-line errors; ``what`` names the part."""
    if source:
        require_source(source, what)
    with loading_errors(what):
        return loader(source, **options)


_WEIGHTS_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?"
    r"\.(?:safetensors|bin)"
)
"""File names of weights in diffusers and transformers: whole or in several files, with or without a variant."""


def find_variant(folder: Path, wanted: str | None, what: str) -> str | None:
    """Return the variant of the weights to load from a folder; None: the weights without a variant.

    Args:
        folder: of one part of a model.
        wanted: the variant asked for. If the folder lacks it, what it has is loaded, as diffusers' pipelines do.
        what: starts the error.

    Raises:
        UserError: there are several variants, and nothing says which.
    """
    matches = (_WEIGHTS_FILE.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    there = {match["variant"] for match in matches if match}
    if wanted in there:
        return wanted
    if None in there or not there:
        return None
    if len(there) > 1:
        raise UserError(
            f"{what}: {folder} holds several variants of its weights: --variant {' or '.join(sorted(there))}"
        )
    return there.pop()


def holds(dtype: torch.dtype, source: str, what: str, *, variant: str | None, subfolder: str = "") -> bool:
    """Return whether a part's safetensors files hold numbers of this type alone; False where they are not on disk yet.

    Args:
        dtype: float16 or bfloat16.
        source: folder or hub id.
        what: starts the error.
        variant: of the files, as :func:`load_weights` takes it.
        subfolder: of the part.

    Raises:
        UserError: there are several variants, and nothing says which.
    """
    folder = part_on_disk(source, subfolder)
    if folder and Path(source).is_dir():
        variant = find_variant(folder, variant, what)
    found = set()
    for path in folder.glob("*.safetensors") if folder else ():
        match = _WEIGHTS_FILE.fullmatch(path.name)
        if match and match["variant"] == variant:
            with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:  # loading reports what is wrong
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  (no dict)
    return {name for name in found if "F" in name} == {_IN_FILES[dtype]}


def variant_remark(model: str, wanted: str | None) -> str | None:
    """Say which parts of a model folder are loaded from a variant of their weights; None where none is.

    Raises:
        UserError: a part has several and nothing says which, or no part has the one asked for.
    """
    if not Path(model).is_dir():
        return None  # for a hub id, the library reports what is missing
    what = f"--model {model}"
    parts = sorted(path for path in Path(model).iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {part.name: variant for part in parts if (variant := find_variant(part, wanted, what))}
    if wanted and wanted not in found.values():
        raise UserError(f"--variant {wanted}: no part of {model} has weights of this variant")
    named = ", ".join(f"{part} ({variant})" for part, variant in found.items())
    return f"{model}: variants of the weights are loaded: {named}" if found else None


def load_weights(
    loader: Callable[..., Any],
    source: str | None,
    what: str,
    *,
    variant: str | None = None,
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Like :func:`load_part`, for parts with weights: none of them may be missing from the checkpoint.

    The libraries fill what is missing with random values, and go on. transformers refuses weights of another shape
    without naming one; with ``ignore_mismatched_sizes`` they are refused here, by name.

    Args:
        loader: a ``from_pretrained``.
        source: folder or hub id; None where ``options`` hold the weights.
        what: starts the error.
        variant: of the files of weights, for example ``fp16``. A folder that holds only one is loaded from it.
        options: for ``loader``.

    Raises:
        UserError: the part cannot be loaded, or its checkpoint is incomplete or of other shapes.
    """
    if source and Path(source).is_dir():
        variant = find_variant(Path(source) / options.get("subfolder", ""), variant, what)
    if variant:
        options["variant"] = variant
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
        UserError: it cannot be loaded, or its files are missing, for which the library would make an empty vocabulary.
    """
    name = options.get("subfolder", "tokenizer")
    try:
        tokenizer = load_part(loader, source, what, **options)
    except UserError as error:
        if find_spec("sentencepiece") or "tiktoken" not in str(error):
            raise
        # The library names the package that it tried last.
        raise UserError(
            f"{what} cannot be loaded: its {name} has no tokenizer.json, only a SentencePiece file; "
            "pip install sentencepiece protobuf"
        ) from error
    # T5's tokenizer has a space even without a vocabulary.
    if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "\u2581"}:
        raise UserError(f"{what} cannot be loaded: its {name} is missing or has no vocabulary")
    return tokenizer
