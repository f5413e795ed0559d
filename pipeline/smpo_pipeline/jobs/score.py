"""``smpo-pipeline score`` on Ray Data: read and decode -> one actor pool a reward -> write a part."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from smpo_pipeline.jobs.cluster import actor_options, run_units, use_threads
from smpo_pipeline.jobs.prepare import from_bytes, pixels_of, prepare_unit, to_bytes
from smpo_pipeline.jobs.run import Run, UnitRecord, describe_input, write_record
from smpo_pipeline.rewards import Reward, load_reward, parse_reward
from smpo_schemas.errors import UserError
from smpo_schemas.pairs import PairColumns, RowRange, column_names, list_pair_files, resolve_columns, slice_files
from smpo_schemas.rejects import Reject, write_rejects
from smpo_schemas.scores import (
    IMAGE_IDS,
    REJECTS_FILE,
    SCORES_FILE,
    SCORES_VERSION,
    RewardStatistics,
    ScoresInfo,
    ScoresPart,
    read_scores,
    read_scores_info,
    reward_statistics,
    write_part,
    write_scores_info,
)

_PAIRS_PER_PART = 64
"""Rows of one unit; decoded, 64 pairs of 1024-pixel images are 400 MB, which a worker must hold."""

_STAGE = "score"


class ScoreOptions(BaseModel):
    """Everything ``score`` is told; fields as the command line's flags."""

    model_config = ConfigDict(frozen=True)

    pairs: list[Path]
    out: Path
    reward: list[str]
    columns: dict[str, str | None]
    batch_size: int
    device: str
    concurrency: int
    ray_address: str | None
    limit: int | None
    overwrite: bool


def score(options: ScoreOptions) -> ScoresInfo:
    """Score all pairs with all rewards, or finish what an earlier run of the same command began.

    Raises:
        UserError: an input, a reward or the output directory cannot be used, or no pair could be scored.
    """
    files = list_pair_files(options.pairs)
    columns = {file.path: resolve_columns(column_names(file.path), options.columns, file.path) for file in files}
    units = slice_files(files, _PAIRS_PER_PART, options.limit)
    models = _check_rewards(options)
    identity = {
        "job": "score",
        "schema_version": SCORES_VERSION,
        "input": describe_input(files, options.limit),
        "columns": {key: value for key, value in options.columns.items() if value},
        "rewards": {name: {"model": info[0], "fingerprint": info[1]} for name, info in models.items()},
    }
    run = Run(options.out, SCORES_FILE, identity)
    if not run.open(overwrite=options.overwrite, patterns=("scores-*.parquet", REJECTS_FILE)):
        return read_scores_info(options.out)

    def build(source: ray.data.Dataset) -> ray.data.Dataset:
        dataset = source.map(partial(_prepare, units=units, columns=columns), num_cpus=1)
        for spec in options.reward:
            dataset = dataset.map(
                _RewardActor,
                fn_constructor_kwargs={
                    "spec": spec,
                    "device": options.device,
                    "batch_size": options.batch_size,
                    "concurrency": options.concurrency,
                },
                **actor_options(options.device, options.concurrency, pools=len(options.reward)),
            )
        return dataset.map(partial(_write, run=run, rewards=list(models)), num_cpus=1)

    sizes = [sum(part.stop - part.start for part in unit) for unit in units]
    records = run_units(
        run,
        sizes,
        build,
        title="score",
        address=options.ray_address,
        device=options.device,
        concurrency=options.concurrency,
    )
    info = _finish(options.out, records, models)
    run.finish()
    return info


def _check_rewards(options: ScoreOptions) -> dict[str, tuple[str, str, str]]:
    """Load each reward once, before any work starts: name -> (model, fingerprint, unit)."""
    names = [parse_reward(spec)[0].name for spec in options.reward]
    if len(set(names)) != len(names):
        raise UserError(f"--reward names {max(names, key=names.count)} twice; a scores table has one column a name")
    models = {}
    for spec in options.reward:
        reward = load_reward(spec, "cpu")
        models[reward.name] = (reward.model, reward.fingerprint, reward.unit)
    return models


def _prepare(row: dict[str, Any], units: Sequence[list[RowRange]], columns: dict[Path, PairColumns]) -> dict[str, Any]:
    unit = row["unit"]
    ranges = units[unit]
    names = [columns[part.path] for part in ranges]
    table, rejects = prepare_unit(ranges, names, unit * _PAIRS_PER_PART, _whole, _STAGE)
    return {
        "unit": unit,
        "table": to_bytes(table),
        "rejects": json.dumps([reject.model_dump() for reject in rejects]),
        "scores": json.dumps({}),
    }


def _whole(image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
    """Rewards see the image as it is; each scales it in its own model's way."""
    return np.asarray(image), (0, 0)


class _RewardActor:
    """Holds one reward and adds its scores to units."""

    def __init__(self, spec: str, device: str, batch_size: int, concurrency: int) -> None:
        use_threads(device, concurrency)
        self._reward: Reward = load_reward(spec, device)
        self._batch_size = batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pairs = from_bytes(row["table"]).to_pylist()
        images = [(pair, index) for pair in pairs for index in range(2)]
        values: list[float] = []
        for start in range(0, len(images), self._batch_size):
            part = images[start : start + self._batch_size]
            pictures = [Image.fromarray(pixels_of(pair, index)) for pair, index in part]
            values += self._reward.score(pictures, [pair["prompt"] for pair, _ in part]).tolist()
        scores = json.loads(row["scores"]) | {self._reward.name: list(zip(values[::2], values[1::2], strict=True))}
        return {**row, "scores": json.dumps(scores)}


def _write(row: dict[str, Any], run: Run, rewards: Sequence[str]) -> dict[str, str]:
    """Commit a unit: its part of the table, then its record."""
    columns = ["pair_id", "prompt", "label", "annotator", *IMAGE_IDS, "source"]
    pairs = from_bytes(row["table"]).select(columns).to_pylist()
    rejects = [Reject(**each) for each in json.loads(row["rejects"])]
    scores = json.loads(row["scores"])
    kept = []
    for number, pair in enumerate(pairs):
        source = pair.pop("source")
        both = {name: scores[name][number] for name in rewards}
        bad = next((name for name, values in both.items() if not all(map(math.isfinite, values))), None)
        if bad:
            reason = f"not finite: {bad} gave no number for an image of this pair"
            rejects.append(Reject(pair_id=pair["pair_id"], source=source, stage=_STAGE, reason=reason))
        else:
            kept.append(pair | {f"{name}_{i}": values[i] for name, values in both.items() for i in range(2)})
    unit = int(row["unit"])
    part = write_part(run.out / f"scores-{unit:06d}.parquet", kept, rewards) if kept else None
    record = UnitRecord(
        unit=unit,
        pairs_in=len(kept) + len(rejects),
        pairs=len(kept),
        rejects=rejects,
        entry=part.model_dump() if part else None,
    )
    write_record(run.record_path(unit), record)
    return {"record": record.model_dump_json()}


def _finish(out: Path, records: Sequence[UnitRecord], models: dict[str, tuple[str, str, str]]) -> ScoresInfo:
    """Write the rejects, then ``scores.json``, which marks the run as finished."""
    rejects = [reject for record in records for reject in record.rejects]
    write_rejects(out / REJECTS_FILE, rejects)
    parts = [ScoresPart.model_validate(record.entry) for record in records if record.entry]
    if not parts:
        first = f"; the first: {rejects[0].source}: {rejects[0].reason}" if rejects else ""
        raise UserError(f"no pair could be scored, {len(rejects)} were rejected (see {out / REJECTS_FILE}){first}")
    info = ScoresInfo(
        schema_version=SCORES_VERSION,
        rewards={},
        parts=parts,
        scored=sum(part.pairs for part in parts),
        rejected=len(rejects),
    )
    table = read_scores(out, info)
    labels = table["label"].to_numpy().astype(np.float64)
    statistics: dict[str, RewardStatistics] = {}
    for name, (model, fingerprint, unit) in models.items():
        scores_P2 = np.stack([table[f"{name}_{index}"].to_numpy() for index in range(2)], axis=1)
        statistics[name] = reward_statistics(scores_P2, labels, model=model, fingerprint=fingerprint, unit=unit)
    info = info.model_copy(update={"rewards": statistics})
    write_scores_info(out, info)
    return info
