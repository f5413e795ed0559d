"""What the trainings behind the world's checkpoints share: pictures to learn from, and the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from smpo_pipeline.toy.world import captions_of, random_centre, render, scene_of

Report = Callable[[str], None]
"""Takes one line about the progress of a long job."""

_REPORTS = 10
_WARMUP_SHARE = 0.05


def training_renders(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Perfect pictures of random scenes of the train split, the shape at a random place.

    Returns:
        uint8 [count, 32, 32, 3], and the count captions.
    """
    captions = [str(caption) for caption in rng.choice(captions_of("train"), size=count)]
    scenes = [scene_of(caption) for caption in captions]
    return np.stack([render(scene, random_centre(scene, rng)) for scene in scenes]), captions


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] pictures as a diffusion model sees them: float32 [N, 3, H, W], -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def steps(
    name: str, parameters: Iterable[torch.nn.Parameter], count: int, lr: float, report: Report
) -> Iterator[Callable[[torch.Tensor], None]]:
    """Runs a training: yields, `count` times, the function that takes a loss and makes the step.

    AdamW, gradients clipped to norm 1, a short warm-up and a cosine decay to zero.

    Args:
        name: what is trained, for the progress lines.
        parameters: what to train.
        count: number of steps.
        lr: peak learning rate.
        report: takes the progress lines.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    warmup = max(1, int(count * _WARMUP_SHARE))
    losses: list[float] = []

    def make_step(loss: torch.Tensor) -> None:
        step = len(losses)
        decay = 0.5 * (1 + math.cos(math.pi * step / count))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())

    every = max(1, count // _REPORTS)
    for step in range(1, count + 1):
        yield make_step
        if step % every == 0:
            report(f"{name}: step {step}/{count}, loss {np.mean(losses[-every:]):.4f}")
