"""Generate one model's images for an evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from smpo_common.errors import UserError
from smpo_common.files import write_bytes
from smpo_models.memory import is_out_of_memory
from smpo_pipeline.evaluation.results import Settings
from smpo_pipeline.generation.generator import Generator
from smpo_pipeline.isolation import FAILURES


@dataclass(frozen=True)
class Picture:
    """One image: its prompt, its number within the prompt, and its file."""

    prompt: str
    index: int
    path: Path


def generate(
    generator: Generator,
    pictures: Sequence[Picture],
    settings: Settings,
    batch_size: int,
    advance: Callable[[int], None],
) -> None:
    """Generate the pictures and write each as a PNG, atomically.

    Args:
        generator: the model.
        pictures: the images to generate.
        settings: of the sampling.
        batch_size: images at once; halved when memory runs out.
        advance: called after each batch with its number of images.

    Raises:
        UserError: memory is too small for a single image.
    """
    done = 0
    while done < len(pictures):
        batch = pictures[done : done + batch_size]
        try:
            images = _sample(generator, batch, settings)
        except FAILURES as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                half = "; --dtype fp16 needs half" if settings.dtype == "fp32" else ""
                raise UserError(f"too little memory to sample one image: {error}{half}") from error
            batch_size = len(batch) // 2
            continue
        for picture, image in zip(batch, images, strict=True):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            write_bytes(picture.path, buffer.getvalue())
        done += len(batch)
        advance(len(batch))


def _sample(generator: Generator, batch: Sequence[Picture], settings: Settings) -> list[Image.Image]:
    sampled = generator.sample([(picture.prompt, picture.index) for picture in batch], settings)
    return [each.image for each in sampled]
