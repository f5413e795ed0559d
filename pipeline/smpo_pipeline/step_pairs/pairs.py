"""Choose the two draws of a step that are its pair, and describe the pair for a shard."""

from __future__ import annotations

import hashlib

import numpy as np

from smpo_pipeline.generation.generator import Wanted
from smpo_schemas.labels import TIE
from smpo_schemas.shards.samples import SampleMeta


def step_pair_id(prompt: str, number: int, step: int) -> str:
    """Return the id of the pair from a step of a prompt's ``number``-th trajectory."""
    return hashlib.sha256(f"step\n{step}\n{number}\n{prompt}".encode()).hexdigest()[:32]


def best_and_worst(scores_N: np.ndarray) -> tuple[int, int]:
    """Return the places of the best and the worst of N draws, in their order; draws without a score (NaN) come last.

    Among equal draws, the first is the best and the last the worst.
    """
    best = int(np.nan_to_num(scores_N, nan=-np.inf).argmax())
    worst = len(scores_N) - 1 - int(np.nan_to_num(scores_N, nan=np.inf)[::-1].argmin())
    if best == worst:  # there is only one score, or none
        worst = 0 if best else len(scores_N) - 1
    return min(best, worst), max(best, worst)


def describe_pair(wanted: Wanted, step: int, scores_2: np.ndarray, name: str, *, gap: float, side: int) -> SampleMeta:
    """Describe a pair; the label is by the reward, a tie within the gap.

    Args:
        wanted: prompt, and number among its prompt's trajectories.
        step: of the sampler, from 1, the last.
        scores_2: of both images.
        name: of the reward.
        gap: largest difference of a tie.
        side: of the images in pixels.
    """
    prompt, number = wanted
    first, second = scores_2.tolist()
    label = TIE if abs(first - second) <= gap else float(first > second)
    return SampleMeta(
        pair_id=step_pair_id(prompt, number, step),
        trajectory=0,
        flipped=False,
        prompt=prompt,
        prompt_dropped=False,
        label=label,
        annotator=f"steps:{name}",
        scores={name: (first, second)},
        size=((side, side), (side, side)),
        crop=((0, 0), (0, 0)),
    )
