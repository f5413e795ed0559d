"""Write the scores table of a selection: its pairs first, then all candidates, for win rates over all images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from smpo_common.store_path import AnyPath
from smpo_pipeline.selection.assemble import SelectedPair
from smpo_schemas.scoring.scores import (
    IMAGE_IDS,
    SCORES_VERSION,
    RewardStatistics,
    ScoresInfo,
    ScoresPart,
    reward_scores,
    write_part,
    write_scores_info,
)

_PART_ROWS = 1 << 16


def write_selected_scores(
    out: AnyPath, table: pa.Table, info: ScoresInfo, pairs: Sequence[SelectedPair], annotator: str, place_I: np.ndarray
) -> None:
    """Write the folder; ``scores.json`` last.

    Args:
        out: the folder.
        table: the candidates' scores.
        info: their ``scores.json``.
        pairs: the selected pairs.
        annotator: name of the selection.
        place_I: first place of each distinct image in the flattened [P, 2] of the table.
    """
    rewards = list(info.rewards)
    parts: list[ScoresPart] = []
    for rows in (_selected_rows(table, pairs, rewards, annotator), table):
        for start in range(0, rows.num_rows, _PART_ROWS):
            name = f"scores-{len(rewards)}-{len(parts):06d}.parquet"
            parts.append(write_part(out / name, rows.slice(start, _PART_ROWS), rewards))
    statistics = {
        name: _over_images(reward, reward_scores(table, name).reshape(-1)[place_I])
        for name, reward in info.rewards.items()
    }
    scored = len(pairs) + table.num_rows
    write_scores_info(
        out,
        ScoresInfo(schema_version=SCORES_VERSION, rewards=statistics, parts=parts, scored=scored, rejected=0),
    )


def _selected_rows(table: pa.Table, pairs: Sequence[SelectedPair], rewards: Sequence[str], annotator: str) -> pa.Table:
    columns = {
        "pair_id": pa.array([pair.pair_id for pair in pairs], pa.string()),
        "prompt": pa.array([pair.prompt for pair in pairs], pa.string()),
        "label": pa.array([pair.label for pair in pairs], pa.float32()),
        "votes": pa.nulls(len(pairs), pa.int32()),
        "annotator": pa.array([annotator] * len(pairs), pa.string()),
    }
    for side, name in enumerate(IMAGE_IDS):
        columns[name] = pa.array([pair.image_ids[side] for pair in pairs], pa.string())
    places = np.array([pair.places for pair in pairs], dtype=np.int64).reshape(-1, 2)
    for name in rewards:
        flat = np.stack([table[f"{name}_{side}"].to_numpy() for side in (0, 1)], axis=1).reshape(-1)
        for side in (0, 1):
            columns[f"{name}_{side}"] = pa.array(flat[places[:, side]], pa.float32())
    return pa.table(columns)


def _over_images(reward: RewardStatistics, scores_I: np.ndarray) -> RewardStatistics:
    """Describe a reward over the distinct images; its agreement with people's labels stays that of the candidates."""
    numbers = {"min": scores_I.min(), "max": scores_I.max(), "mean": scores_I.mean(), "std": scores_I.std()}
    return reward.model_copy(update={name: float(number) for name, number in numbers.items()})
