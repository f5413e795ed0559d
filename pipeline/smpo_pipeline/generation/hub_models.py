"""Published models on the hub: a whole pipeline, a denoiser alone such as those of Diffusion-DPO, or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from smpo_common.errors import UserError
from smpo_schemas.trained_model import DENOISER_FOLDERS, LORA_FILE

if TYPE_CHECKING:
    from smpo_pipeline.generation.source import Kind

_INDEX = "model_index.json"


def find_on_hub(given: str, source: str) -> tuple[Kind, Path | None]:
    """Tell what a repository holds; download a denoiser or a LoRA, which is then a folder or file like any other.

    Args:
        given: names it in errors.
        source: ``OWNER/NAME``, or ``OWNER/NAME/FILE.safetensors`` of a LoRA.

    Returns:
        What it is, and where it lies; None for a whole model, which diffusers loads by its id.

    Raises:
        UserError: it holds no model, or the hub cannot be asked.
    """
    from smpo_models.hub import require_source  # noqa: PLC0415  (keeps --help quick)

    repository = "/".join(source.split("/")[:2])
    require_source(repository, given)
    if source != repository:
        name = source.removeprefix(f"{repository}/")
        if file := _file(given, repository, name):
            return "lora", file
        raise UserError(f"{given}: {repository} on the hub has no file {name}")
    if _file(given, source, _INDEX):
        return "pipeline", None
    for folder in DENOISER_FOLDERS:
        if _file(given, source, f"{folder}/config.json"):
            return "denoiser", _files(given, source, [f"{folder}/*"])
    if _file(given, source, "config.json"):
        return "denoiser", _files(given, source, ["config.json", "*.safetensors*", "*.bin*"])
    if found := _file(given, source, LORA_FILE):
        return "lora", found
    raise UserError(
        f"{given}: {source} on the hub has no {_INDEX}, no {'/config.json, '.join(DENOISER_FOLDERS)}/config.json or "
        f"config.json of a denoiser, and no {LORA_FILE}; name a LoRA's file as {source}/FILE.safetensors"
    )


def _file(given: str, repository: str, name: str) -> Path | None:
    """Download a file, or find it in the cache; None where the repository, or without the hub the cache, has none."""
    try:
        with _one_line(given):
            return Path(hf_hub_download(repository, name))
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            return None
        raise UserError(f"{given}: the hub cannot be reached: {error}") from error
    except EntryNotFoundError:
        return None


def _files(given: str, repository: str, patterns: list[str]) -> Path:
    """Download files, or find them in the cache; return their folder."""
    with _one_line(given):
        return Path(snapshot_download(repository, allow_patterns=patterns))


@contextmanager
def _one_line(given: str) -> Iterator[None]:
    """Say in one line why the hub gives nothing: no such repository, no permission, no connection."""
    try:
        yield
    except EntryNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{given} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
