"""Parse ``--model`` and ``--reward`` and hash the files behind them, without loading a model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from smpo_common.errors import UserError
from smpo_common.files import files_below, sha256_file, sha256_json
from smpo_pipeline.generation.source import INDEX_FILE, ModelSource, find_denoiser, find_source
from smpo_schemas.trained_model import LORA_FILE

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READ_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".model")
_CHECKPOINT_COMPANIONS = (
    "*config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "model*.safetensors*",
    "pytorch_model*",
)
"""Files that a reward may read beside its checkpoint: configurations, a tokenizer, a CLIP."""


def parse_models(specs: Sequence[str], negatives: Sequence[str] = ()) -> list[ModelSource]:
    """Read ``NAME=DIR_OR_ID`` specifications; the first one is the baseline.

    Args:
        specs: of ``--model``.
        negatives: of ``--negative``, each of a model with this name.

    Raises:
        UserError: a name is malformed, repeated or unknown, or a folder is missing or holds no model.
    """
    models = {model.name: model for model in _parse("--model", specs)}
    for negative in _parse("--negative", negatives):
        if negative.name not in models:
            raise UserError(f"{negative.named}: no --model has this name; known: {', '.join(models)}")
        models[negative.name] = replace(models[negative.name], negative=negative)
    return list(models.values())


def _parse(flag: str, specs: Sequence[str]) -> list[ModelSource]:
    named = parse_names(flag, specs)
    # In errors, a --model is named by its name and source, a model of another flag by that flag's text.
    given = {name: f"{flag} {name}={source}" for name, source in named.items()}
    return [
        find_source(name, given[name], source, flag=None if flag == "--model" else given[name])
        for name, source in named.items()
    ]


def parse_names(flag: str, specs: Sequence[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Read ``NAME=VALUE`` specifications.

    Args:
        flag: of the specifications.
        specs: its values.
        taken: names that other flags gave.

    Raises:
        UserError: a name is malformed or used twice.
    """
    named: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or not source or not _NAME.fullmatch(name):
            raise UserError(
                f"{flag} {spec}: write NAME=DIR, for example tuned=runs/a; a name has letters, digits and . _ - only"
            )
        if name in named or name in taken:
            raise UserError(f"{flag} {spec}: the name {name!r} is used twice; give each model its own name")
        named[name] = source
    return named


def choose_base(models: Sequence[ModelSource], given: str | None) -> str | None:
    """Choose the whole model that completes ``denoiser`` and ``lora`` ones: ``given``, else the first whole one.

    Raises:
        UserError: it is needed and there is none.
    """
    whole = [model.source for model in models if model.kind == "pipeline"]
    base = given or (whole[0] if whole else None)
    both = [*models, *(model.negative for model in models if model.negative)]
    partial = [model for model in both if model.kind != "pipeline"]
    if partial and base is None:
        raise UserError(
            f"{partial[0].named} is a denoiser or a LoRA, not a whole pipeline; name the "
            "model that it was trained from with --base"
        )
    return base if partial else None


def identity(model: ModelSource, base: str | None) -> str:
    """Hash all files that ``model`` is loaded from; a hub id stands for itself.

    Hashing the files recognises a finished evaluation without loading a model.
    """
    if model.negative:
        return sha256_json(
            {"positive": identity(replace(model, negative=None), base), "negative": identity(model.negative, base)}
        )
    if model.kind == "pipeline":
        return whole_identity(model.source)
    found = find_denoiser(model.path) if model.denoiser else None
    folder, replaced = found or (model.path, None)
    rest = whole_identity(base, without=replaced) if base else ""
    if replaced:
        own = {f"{replaced}/{name}": digest for name, digest in _digest(folder, _model_files(folder)).items()}
    else:
        own = {LORA_FILE: sha256_file(model.lora_file)}
    return sha256_json({"own": own, "rest": rest})


def whole_identity(source: str, without: str | None = None) -> str:
    """Hash a model folder's files, except those of one subfolder; return a hub id as it is."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in _READ_SUFFIXES]
    for part in _parts(folder):
        if part != without:
            files += _model_files(folder / part)
    return sha256_json(_digest(folder, files))


def reward_identity(spec: str) -> str:
    """Hash the files of MODEL in ``NAME=MODEL``; return a hub id, or ``spec`` without a MODEL, as it is.

    All files of a folder count, except hidden ones, since a user's own reward may read any. Its code is not hashed.
    """
    model = spec.partition("=")[2]
    path = Path(model)
    if model and path.is_dir():
        return sha256_json(_digest(path, _files_below(path)))
    if path.is_file():
        beside = {file for pattern in _CHECKPOINT_COMPANIONS for file in path.parent.glob(pattern) if file.is_file()}
        return sha256_json(_digest(path.parent, [*{path, *beside}]))
    return model or spec


def _parts(folder: Path) -> list[str]:
    """List the subfolders of a pipeline's parts, as its index names them."""
    index = folder / INDEX_FILE
    try:
        names = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    except ValueError as error:
        raise UserError(f"{index} is not a JSON file: {error}") from error
    return [name for name in names if (folder / name).is_dir()]


def _model_files(folder: Path) -> list[Path]:
    return [path for path in _files_below(folder) if path.suffix in _READ_SUFFIXES]


def _files_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if isinstance(path, Path) and path.is_file()]


def _digest(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(files)}
