"""Check folders and hub ids of models before any library tries to load them."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id

from smpo_common.errors import UserError


def require_source(source: str, what: str) -> None:
    """Refuse a source that is neither a folder or file nor a hub id that can be loaded.

    Args:
        source: as the user gave it.
        what: starts the error.

    Raises:
        UserError: there is no such folder or file, and the source is no valid hub id, or it is not in the cache and
            ``HF_HUB_OFFLINE`` is set.
    """
    if Path(source).exists():
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise UserError(f"{what}: no such folder: {source}; nor is it a hub id, OWNER/NAME") from None
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=source, repo_type="model")
    if constants.HF_HUB_OFFLINE and not cached.is_dir():
        raise UserError(
            f"{what}: no such folder: {source}; as a hub id it is not in the cache ({constants.HF_HUB_CACHE}), and "
            "HF_HUB_OFFLINE=1"
        )


def part_on_disk(source: str, subfolder: str) -> Path | None:
    """Return the folder of a part of a model, for hub ids the one in the cache; None if its config is not there."""
    if Path(source).is_dir():
        return Path(source) / subfolder
    config = try_to_load_from_cache(source, f"{subfolder}/config.json")
    return Path(config).parent if isinstance(config, str) else None
