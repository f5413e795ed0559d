"""What happens to a unit of ``score``: rewards look at its chunks, the driver puts them together and commits it."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_file
from smpo_common.retry import retry_transient
from smpo_common.store_path import AnyPath
from smpo_models.weights import DTYPES
from smpo_pipeline.isolation import make, run_alone
from smpo_pipeline.jobs.faults.crashes import CrashGuard, WorkLog
from smpo_pipeline.jobs.prepare import values_of
from smpo_pipeline.jobs.ray.session import plain_arithmetic
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.score.chunks import (
    ROWS,
    failures_of,
    images_of,
    scores_of,
    with_scores,
    without_images,
)
from smpo_pipeline.jobs.score.pair_ids import RepeatedIds
from smpo_pipeline.rewards import Reward, checked_scores, load_reward
from smpo_schemas.rejects import Reject

STAGE = "score"


class RewardActor:
    """Holds one reward and adds its scores to chunks."""

    def __init__(
        self,
        spec: str,
        fingerprint: str,
        device: str,
        dtype: str,
        batch_size: int,
        work_log: WorkLog,
        *,
        share: float,
        last: bool,
    ) -> None:
        """Load the reward.

        Args:
            spec: as ``--reward`` names it.
            fingerprint: of what the driver found under that name, and wrote down.
            device: cpu or cuda.
            dtype: of matrix products; autocast leaves the weights, and what half precision would spoil, in float32.
            batch_size: images a model call, at most.
            work_log: of the job.
            share: of a pair's work that is this reward's, 0 to 1, for the progress that is shown.
            last: no other reward needs the images.
        """
        plain_arithmetic(device)
        self._reward: Reward = load_reward(spec, device)
        self._spec, self._fingerprint = spec, fingerprint
        self._autocast = nullcontext if dtype == "fp32" else partial(torch.autocast, device, DTYPES[dtype])
        self._device, self._batch_size, self._last = device, batch_size, last
        self._guard, self._reporter, self._share = CrashGuard(work_log), Reporter(work_log), share

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score all images of a chunk, ``batch_size`` at a time.

        Raises:
            UserError: the reward is not the driver's.
        """
        # Not in the constructor: what leaves one is tried again five times, for it may pass.
        if self._reward.fingerprint != self._fingerprint:
            raise UserError(
                f"--reward {self._spec}: the weights on {socket.gethostname()} are others (fingerprint "
                f"{self._reward.fingerprint[:12]}) than where the command was started ({self._fingerprint[:12]}); give "
                "every machine the same files"
            )
        name, unit, number = self._reward.name, chunk["unit"][0].as_py(), chunk["chunk"][0].as_py()
        key = (name, unit, number)
        with self._autocast():
            alone = partial(run_alone, self._score, device=self._device)
            failed = self._guard.crashing_items(key, alone, images_of(chunk))
        words = f"--reward {name} scored chunk {number} of unit {unit}: too little memory? use a smaller --batch-size"
        with self._autocast(), self._guard.working(key, words):
            scores = self._scores(chunk, failed)
        scored = with_scores(chunk, {name: scores}, failed)
        return without_images(scored) if self._last else scored

    def _scores(self, chunk: pa.Table, failed: dict[int, str]) -> np.ndarray:
        """float64 [N] of a chunk's images, NaN of those in ``failed``, to which are added those the reward fails on."""
        scores = np.full(len(values_of(chunk, "height")), np.nan)
        images = ((number, image) for number, image in enumerate(images_of(chunk)) if number not in failed)
        while batch := list(islice(images, self._batch_size)):
            numbers = np.array([number for number, _ in batch])
            outcome = make(self._score, [image for _, image in batch], self._device)
            self._batch_size = outcome.fits or self._batch_size
            for positions, values in outcome.made:
                scores[numbers[positions]] = values
            failed |= {int(numbers[position]): reason for position, reason in outcome.failed.items()}
            self._report(chunk, (numbers[-1] + 1) / len(scores))
        return scores

    def _report(self, chunk: pa.Table, done: float) -> None:
        """``done``: the share of a chunk's images that have been looked at."""
        unit, number = chunk["unit"][0].as_py(), chunk["chunk"][0].as_py()
        pairs = len(values_of(chunk, "pair_id")) * self._share * done
        self._reporter.report(unit, (number, self._reward.name), pairs)

    def _score(self, batch: Sequence[tuple[Image.Image, str]]) -> np.ndarray:
        return checked_scores(self._reward, [image for image, _ in batch], [prompt for _, prompt in batch])


class UnitCollector:
    """Puts the chunks of units together and commits each unit that is complete.

    It lives on the driver and nobody else commits: Ray may run a task twice, but hands its result over once.
    """

    def __init__(self, run: Run, rewards: Sequence[str], max_reject_rate: float) -> None:
        self._run, self._rewards, self._repeated = run, rewards, RepeatedIds(max_reject_rate)
        self._chunks: dict[int, dict[int, pa.Table]] = defaultdict(dict)
        self._counts: dict[int, int] = {}

    def __call__(self, table: pa.Table) -> Iterator[UnitRecord]:
        """Take some chunks; yield the records of the units that they complete.

        Raises:
            UserError: more of the pairs than may be rejected have the id of another pair.
        """
        for row in range(table.num_rows):
            chunk = table.slice(row, 1)
            unit, number, last = (chunk[name][0].as_py() for name in ("unit", "chunk", "last"))
            self._chunks[unit][number] = chunk
            if last:
                self._counts[unit] = number + 1
            if len(self._chunks[unit]) == self._counts.get(unit):
                numbered = self._chunks.pop(unit)
                chunks = [numbered[index] for index in range(self._counts.pop(unit))]
                columns = {name: pa.concat_arrays([values_of(each, name) for each in chunks]) for name in ROWS.names}
                rows = pa.table(columns)
                yield self._commit(unit, rows, chunks)
                self._repeated.add(rows.filter(pc.is_null(rows["reason"])))

    @retry_transient
    def _commit(self, unit: int, rows: pa.Table, chunks: Sequence[pa.Table]) -> UnitRecord:
        scores = {name: np.concatenate([scores_of(chunk, name) for chunk in chunks]) for name in self._rewards}
        failed = {name: [each for chunk in chunks for each in failures_of(chunk, name)] for name in self._rewards}
        table = _with_columns(rows, scores, failed)
        path = unit_path(self._run, unit)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary)
            entry = {
                "name": f"{path.parent.name}/{path.name}",
                "bytes": temporary.stat().st_size,
                "sha256": sha256_file(temporary),
            }
        rejects = rejects_of(table)
        record = UnitRecord(
            unit=unit,
            pairs_in=table.num_rows,
            pairs=table.num_rows - len(rejects),
            rejects=rejects,
            entry=entry,
        )
        self._run.commit(record)
        return record


def unit_path(run: Run, unit: int) -> AnyPath:
    """Where a unit's rows wait until the whole table is written."""
    return run.record_path(unit).with_suffix(".parquet")


def rejects_of(table: pa.Table) -> list[Reject]:
    """The rows of a unit that have a reason why they are not scored."""
    rows = table.filter(pc.is_valid(table["reason"])).select(["pair_id", "source", "reason"]).to_pylist()
    return [Reject(stage=STAGE, **row) for row in rows]


def _with_columns(rows: pa.Table, scores: dict[str, np.ndarray], failed: dict[str, list[str | None]]) -> pa.Table:
    """All rows of a unit, with two float32 columns a reward; a pair with a score that is no number is rejected."""
    scored = np.flatnonzero(pc.is_null(rows["reason"]).to_numpy())
    reasons = np.array(rows["reason"].to_pylist(), dtype=object)
    for name, values_P2 in scores.items():
        with np.errstate(over="ignore"):
            columns_P2 = values_P2.astype(np.float32)
        nothing = f"not finite: {name} gave no number for an image of this pair"
        for pair in np.flatnonzero(~np.isfinite(columns_P2).all(axis=1)):
            position, reason = scored[pair], failed[name][pair]
            reasons[position] = reasons[position] or (f"{reason} ({name})" if reason else nothing)
        for index in range(2):
            column = np.full(rows.num_rows, np.nan, dtype=np.float32)
            column[scored] = columns_P2[:, index]
            rows = rows.append_column(f"{name}_{index}", pa.array(column))
    return rows.set_column(rows.column_names.index("reason"), "reason", pa.array(reasons.tolist(), pa.string()))
