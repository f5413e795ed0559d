"""Suggestions for a run that runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smpo_common.errors import UserError
from smpo_models.memory import is_out_of_memory
from smpo_trainer.settings import TrainSettings


@contextmanager
def explain_out_of_memory(
    settings: TrainSettings, device: str, *, uses_fsdp: bool, holds_text_encoders: bool
) -> Iterator[None]:
    """Replace an out-of-memory error by one line that lists flags to try.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split())[:160] or type(error).__name__
        helps = remedies(settings, uses_fsdp=uses_fsdp, holds_text_encoders=holds_text_encoders)
        raise UserError(
            f"memory ran out on {device}; try {', or '.join(helps)} (the library's message: {message})"
        ) from error


def remedies(settings: TrainSettings, *, uses_fsdp: bool, holds_text_encoders: bool) -> list[str]:
    """List flags that would save memory; first those that do not change the results of the run."""
    steps, compute, lora_rank = settings.steps, settings.compute, settings.denoiser.lora_rank
    half = steps.batch_size // 2
    # A divisor, so that the states of a step stay the same.
    smaller = next((size for size in range(half, 0, -1) if steps.batch_size % size == 0), 1)
    accumulated = steps.grad_accum * steps.batch_size // smaller
    helps = {
        f"--batch-size {smaller} --grad-accum {accumulated}": steps.batch_size > 1,
        "--gradient-checkpointing": not compute.gradient_checkpointing,
        "shards made with `smpo-pipeline invert --text stored`": holds_text_encoders,
        "--reference auto": compute.reference == "live" and lora_rank is None,
        "--dtype bf16": compute.dtype == "fp32",
        "--optimizer adafactor": settings.optimizer.optimizer == "adamw" and lora_rank is None and not uses_fsdp,
        "--lora-rank 16": lora_rank is None,
        "--quantize nf4": lora_rank is not None and settings.denoiser.quantize is None and not uses_fsdp,
        "more GPUs" if uses_fsdp else "several GPUs with FSDP (docs/guide/training.md)": True,
    }
    return [flag for flag, does_help in helps.items() if does_help]
