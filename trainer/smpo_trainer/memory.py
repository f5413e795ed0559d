"""What a run says where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from smpo_common.errors import UserError
from smpo_models.memory import is_out_of_memory
from smpo_trainer.settings import TrainSettings


@contextmanager
def memory_in_a_line(settings: TrainSettings, device: str) -> Iterator[None]:
    """Turn what is raised where memory runs out into one line with what to try.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"memory ran out on {device}; try {', or '.join(remedies(settings))} (the library said: {said})"
        ) from error


def remedies(settings: TrainSettings) -> list[str]:
    """The flags that would need less memory and are not given yet; first those that leave the run's numbers alone."""
    steps, compute, lora_rank = settings.steps, settings.compute, settings.denoiser.lora_rank
    half = steps.batch_size // 2
    # A divisor of the pairs of a step, which stay the same.
    smaller = next((size for size in range(half, 0, -1) if steps.batch_size % size == 0), 1)
    accumulated = steps.grad_accum * steps.batch_size // smaller
    found = {
        f"--batch-size {smaller} --grad-accum {accumulated}": steps.batch_size > 1,
        "--gradient-checkpointing": not compute.gradient_checkpointing,
        "--text cache": compute.text != "cache",
        "--reference auto": compute.reference == "live" and lora_rank is None,
        "--dtype bf16": compute.dtype == "fp32",
        "--optimizer adafactor": settings.optimizer.optimizer == "adamw" and lora_rank is None,
        "--lora-rank 16": lora_rank is None,
        "several GPUs with FSDP (docs/guide/training.md)": True,
    }
    return [name for name, helps in found.items() if helps]
