"""The adapter of ``--lora-rank``: check its flags, and convert that of a finished run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from smpo_common.errors import UserError
from smpo_models.loading import load_family
from smpo_models.tuned.lora_formats import require_lora_format, write_lora_format
from smpo_schemas.trained_model import lora_file
from smpo_trainer.settings import TrainSettings


def require_adapter(settings: TrainSettings) -> None:
    """Check the flags of the adapter, before any weights are loaded.

    Raises:
        UserError: one of them needs ``--lora-rank``; or the model takes no adapter, or it cannot be written in
            ``--lora-format``.
    """
    options = settings.denoiser
    given = {"--lora-alpha": options.lora_alpha is not None, "--lora-format": options.lora_format != "diffusers"}
    without = [flag for flag, is_given in given.items() if is_given and options.lora_rank is None]
    if without:
        raise UserError(f"{', '.join(without)}: for an adapter; give --lora-rank too, for example --lora-rank 16")
    if options.lora_rank is not None:
        load_family(settings.model, ()).check_lora(options.lora_rank, f"--model {settings.model}")
    if given["--lora-format"]:
        require_lora_format(options.lora_format, _denoiser_class(settings), f"--model {settings.model}")


def convert_finished(settings: TrainSettings) -> Path | None:
    """Write the adapter of a finished run in ``--lora-format``, if the run was made without.

    Returns:
        The new file; None where there is nothing to write.

    Raises:
        UserError: the run's own file cannot be read, or the new one cannot be written.
    """
    lora_format = settings.denoiser.lora_format
    if lora_format == "diffusers" or (settings.out / lora_file(lora_format)).is_file():
        return None
    return write_lora_format(settings.out, lora_format, _denoiser_class(settings))


def _denoiser_class(settings: TrainSettings) -> type[nn.Module]:
    return type(load_family(settings.model, ()).empty_denoiser())
