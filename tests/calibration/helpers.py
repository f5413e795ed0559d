"""Scores tables without images, and simulated labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from smpo_pipeline.calibration.labels import LabelledPairs, read_labelled
from smpo_schemas.scoring.scores import SCORES_VERSION, ScoresInfo, reward_statistics, write_part, write_scores_info


def write_scores(
    folder: Path,
    scores: Mapping[str, np.ndarray],
    labels: Sequence[float | None],
    prompts: Sequence[str],
    annotators: Sequence[str | None] | None = None,
    images: Sequence[tuple[str, str]] | None = None,
    pair_ids: Sequence[str] | None = None,
) -> Path:
    """An output of ``score``; each reward's fingerprint is its name."""
    folder.mkdir(parents=True)
    rows = [
        {
            "pair_id": pair_ids[row] if pair_ids else f"pair-{row}",
            "prompt": prompts[row],
            "label": labels[row],
            "annotator": annotators[row] if annotators else None,
            "image_0_id": images[row][0] if images else None,
            "image_1_id": images[row][1] if images else None,
        }
        | {f"{name}_{i}": float(each[row, i]) for name, each in scores.items() for i in (0, 1)}
        for row in range(len(labels))
    ]
    part = write_part(folder / "scores-000000.parquet", rows, list(scores))
    known = np.array([np.nan if label is None else label for label in labels], dtype=float)
    statistics = {
        name: reward_statistics(each, known, model=f"tiny-{name}", fingerprint=name, unit="cosine")
        for name, each in scores.items()
    }
    write_scores_info(
        folder,
        ScoresInfo(schema_version=SCORES_VERSION, rewards=statistics, parts=[part], scored=len(rows), rejected=0),
    )
    return folder


def populations(count: int, seed: int = 0, num_prompts: int = 40):
    """Two rewards of other units; 70 % of the people choose by ``one`` with tau 0.1, 30 % by ``two`` with tau 2.

    Returns:
        Scores, the exact p float64 [count], labels drawn from it (every twentieth a tie), and prompts.
    """
    stream = np.random.default_rng(seed)
    scores = {"one": stream.normal(size=(count, 2)) * 0.2, "two": stream.normal(size=(count, 2)) * 5}
    one, two = ((each[:, 0] - each[:, 1]) / tau for each, tau in zip(scores.values(), (0.1, 2.0), strict=True))
    p = 0.7 / (1 + np.exp(-one)) + 0.3 / (1 + np.exp(-two))
    labels = (stream.random(count) < p).astype(float)
    labels[::20] = 0.5
    return scores, p, labels.tolist(), [f"prompt {number}" for number in stream.integers(num_prompts, size=count)]


def labelled(folder: Path, *arguments, **options) -> LabelledPairs:
    return read_labelled(write_scores(folder, *arguments, **options), [])
