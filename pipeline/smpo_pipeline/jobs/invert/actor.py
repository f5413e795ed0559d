"""What a model actor of ``smpo-pipeline invert`` does: a unit of prepared pairs becomes one committed shard."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from smpo_common.errors import UserError
from smpo_common.files import list_files, read_json, write_json
from smpo_common.store_path import AnyPath
from smpo_pipeline.images.buckets import Size, list_buckets
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.batch_size import (
    batches_of_one_size,
    choose_batch_size,
    trajectory_requests,
    with_most_pixels,
)
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.isolation import Failure, make, run_alone
from smpo_pipeline.jobs.faults.crashes import CrashGuard, WorkLog
from smpo_pipeline.jobs.invert.models import ModelIdentity, describe_model, load_models
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.prepare import pairs_of, values_of
from smpo_pipeline.jobs.ray.session import plain_arithmetic
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_schemas.rejects import Reject
from smpo_schemas.scores import IMAGE_IDS
from smpo_schemas.shards.index import write_index_part
from smpo_schemas.shards.samples import Sample
from smpo_schemas.shards.writer import ShardWriter

STAGE = "invert"
_MEASURED_PAIRS = 128
"""About how many pairs trajectory health is measured on; one more forward for each of their states."""

_BATCH_SIZES = ".batch-size-*.json"


class InvertActor:
    """Holds the model; turns a unit into a shard and commits it."""

    def __init__(
        self,
        options: InvertOptions,
        model: ModelIdentity,
        run: Run,
        scores: ray.ObjectRef,
        rows: int,
        resolution: int,
        work_log: WorkLog,
    ) -> None:
        self._device = options.running.chosen_device
        plain_arithmetic(self._device)
        family, inverting_denoiser = load_models(options)
        # Not raised here: what leaves a constructor is tried again five times, for it may pass.
        self._others = describe_model(options, family, inverting_denoiser) != model
        seed, self._trajectories_a_pair = options.trajectory.seed, options.trajectory.trajectories
        self._inverter = Inverter(family, inverting_denoiser, options.settings, seed, self._device)
        self._family, self._options, self._run = family, options, run
        self._scores: pa.Table = ray.get(scores)
        self._measure_every = max(1, rows // _MEASURED_PAIRS)
        self._batch_size, self._resolution = options.running.batch_size, resolution
        self._guard, self._reporter = CrashGuard(work_log), Reporter(work_log)
        self._model_seconds, self._ready = 0.0, time.monotonic()

    def __call__(self, row: pa.Table) -> pa.Table:
        """Invert and commit the unit of a :func:`unit_row`; returns its record as JSON.

        Raises:
            UserError: the model is not the one that the driver describes.
        """
        if self._others:
            raise UserError(
                f"--model {self._options.models.model}: its files on {socket.gethostname()} "
                "(or those of --unet, --inverting-unet, "
                "--vae) are others than where the command was started; give every machine the same"
            )
        unit = row["unit"][0].as_py()
        record = self._run.committed(unit) or self._make(unit, row)
        self._model_seconds, self._ready = 0.0, time.monotonic()
        return pa.table({"record": [record.model_dump_json()]})

    def _make(self, unit: int, row: pa.Table) -> UnitRecord:
        rejects = [Reject(**each) for each in json.loads(row["rejects"][0].as_py())]
        pairs = list(self._pairs(row, rejects))
        crashing = self._guard.crashing_items(unit, self._invert_alone, (pair for _, _, pair in pairs))
        words = f"unit {unit} was inverted: too little memory? use a smaller --batch-size"
        with self._guard.working(unit, words):
            return self._commit(unit, pairs, rejects, crashing)

    def _commit(
        self, unit: int, pairs: Sequence[tuple[int, str, PreparedPair]], rejects: list[Reject], crashing: dict[int, str]
    ) -> UnitRecord:
        health = HealthSums()
        kept = prompts_cut = 0
        sizes: Counter[Size] = Counter()
        with ShardWriter(self._run.out / f"shard-{unit:06d}.tar") as shard:
            trajectories = self._trajectories(unit, [pair for _, _, pair in pairs], crashing, health)
            for (number, source, pair), samples in zip(pairs, trajectories, strict=True):
                if isinstance(samples, Failure):
                    rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=samples.reason))
                    continue
                kept += 1
                sizes[pair.image_size] += 1
                prompts_cut += self._family.cuts(pair.prompt)
                for sample in samples:
                    shard.write(f"{number * self._trajectories_a_pair + sample.meta.trajectory:010d}", sample)
            self._run.refuse_if_over()
        record = UnitRecord(
            unit=unit,
            pairs_in=kept + len(rejects),
            pairs=kept,
            rejects=rejects,
            entry=shard.entry.model_dump() if kept else None,
            health=health.to_lists(),
            prompts_cut=prompts_cut,
            buckets=list_buckets(sizes) if self._options.models.buckets else [],
            seconds=(self._model_seconds, time.monotonic() - self._ready),
        )
        if kept:
            write_index_part(index_part(self._run, unit), shard.trajectories)
        else:
            (self._run.out / shard.entry.name).unlink()
        self._run.commit(record)
        return record

    def _pairs(self, unit: pa.Table, rejects: list[Reject]) -> Iterator[tuple[int, str, PreparedPair]]:
        """Input row number, source and pair of every pair of a unit that has scores."""
        positions = self._score_rows(values_of(unit, "pair_id"))
        for row, pixels_2HW3 in pairs_of(unit):
            position = positions.get(row["pair_id"])
            scores = {} if position is None else self._scores.slice(position, 1).to_pylist()[0]
            reason = self._why_not_of(scores, row)
            if reason:
                rejects.append(Reject(pair_id=row["pair_id"], source=row["source"], stage=STAGE, reason=reason))
                continue
            names = [name[:-2] for name in scores if name.endswith("_0")]
            pair = PreparedPair(
                pair_id=row["pair_id"],
                prompt=row["prompt"],
                label=row["label"],
                annotator=row["annotator"],
                scores={name: (scores[f"{name}_0"], scores[f"{name}_1"]) for name in names},
                pixels_2HW3=pixels_2HW3,
                size=_two_pairs(row["size"]),
                crop=_two_pairs(row["crop"]),
                measured=row["row"] % self._measure_every == 0,
            )
            yield row["row"], row["source"], pair

    def _why_not_of(self, scores: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
        """Why the scores that stand under a pair's id, if any, cannot be its own."""
        if not scores:
            return f"no score: this pair is not in {self._options.scores} (rejected there, or not scored)"
        if scores["prompt"] != row["prompt"]:
            return f"other pair: {self._options.scores} has another prompt for this pair_id"
        if any(scores.get(name) not in (None, row[name]) for name in IMAGE_IDS):
            return f"other images: {self._options.scores} has others for this pair_id, or these the other way round"
        return None

    def _score_rows(self, ids: pa.Array) -> dict[str, int]:
        """The first row of the scores table for each of a unit's ids that it has.

        The table is searched for the ids, not the ids in the table: hashing a million ids for each unit takes fifteen
        times as long.
        """
        known = self._scores["pair_id"]
        rows = pc.indices_nonzero(pc.is_in(known, value_set=ids.cast(known.type)))
        found = known.take(rows)
        return dict(zip(reversed(found.to_pylist()), reversed(rows.to_pylist()), strict=True))

    def _trajectories(
        self, unit: int, pairs: Sequence[PreparedPair], crashing: dict[int, str], health: HealthSums
    ) -> Iterator[list[Sample] | Failure]:
        """Make all trajectories of each pair, ``batch_size`` at a time, or give the reason why there are none."""
        well = [pair for position, pair in enumerate(pairs) if position not in crashing]
        requests = [(pair, trajectory) for pair in well for trajectory in range(self._trajectories_a_pair)]
        if requests and self._batch_size is None:
            self._find_batch_size(well)
        made: dict[int, Sample | Failure] = {}
        for positions in batches_of_one_size(requests, lambda: self._batch_size or 1):
            batch = self._make_batch([requests[position] for position in positions], health)
            made |= zip(positions, batch, strict=True)
            self._reporter.report(unit, None, len(made) / self._trajectories_a_pair)
        each_trajectory = iter([made[position] for position in range(len(requests))])
        for position in range(len(pairs)):
            if position in crashing:
                yield Failure(crashing[position])
                continue
            of_pair = list(islice(each_trajectory, self._trajectories_a_pair))
            problems = [each for each in of_pair if isinstance(each, Failure)]
            yield problems[0] if problems else [each for each in of_pair if isinstance(each, Sample)]

    def _make_batch(self, requests: Sequence[tuple[PreparedPair, int]], health: HealthSums) -> list[Sample | Failure]:
        """Trajectories, or the reasons why they cannot be made, in order.

        Raises:
            UserError: memory does not hold one trajectory.
        """
        began = time.monotonic()
        outcome = make(self._inverter.invert, requests, self._device)
        self._model_seconds += time.monotonic() - began
        if outcome.short:
            # One trajectory takes about what another does: it is not the pair's fault.
            raise UserError(
                f"too little memory for a single trajectory on {socket.gethostname()}, also after pauses: "
                f"{outcome.short}; "
                "has another program taken it? what is committed stays, the same command goes on"
            )
        if outcome.fits:
            self._use_batches_of(outcome.fits)
        made: dict[int, Sample | Failure] = {position: Failure(reason) for position, reason in outcome.failed.items()}
        for positions, (samples, sums) in outcome.made:
            made |= dict(zip(positions, samples, strict=True))
            health += sums
        return [made[position] for position in range(len(requests))]

    def _invert_alone(self, pair: PreparedPair) -> None:
        for trajectory in range(self._trajectories_a_pair):
            run_alone(self._inverter.invert, (pair, trajectory), self._device)

    def _find_batch_size(self, pairs: Sequence[PreparedPair]) -> None:
        """``--batch-size auto``, for the device that this actor is on."""
        trials = trajectory_requests(with_most_pixels(pairs, self._resolution))
        size = choose_batch_size(
            lambda count: self._inverter.invert([next(trials) for _ in range(count)]),
            self._options.storing.pairs_per_shard * self._trajectories_a_pair,
            self._device,
        )
        self._use_batches_of(size)

    def _use_batches_of(self, size: int) -> None:
        """From now on; leaves a file that says so."""
        self._batch_size = size
        write_json(self._run.out / _BATCH_SIZES.replace("*", f"{socket.gethostname()}-{os.getpid()}"), size)


def index_part(run: Run, unit: int) -> AnyPath:
    """Where it is noted what a unit's tar holds, until the index of all is written."""
    return run.record_path(unit).with_suffix(".parquet")


def take_batch_sizes(out: AnyPath) -> list[int]:
    """What the actors of a run that has ended found with ``--batch-size auto``, or came down to after failures.

    The files that said so are removed.
    """
    files = list_files(out, _BATCH_SIZES)
    found = sorted({read_json(file) for file in files})
    for file in files:
        file.unlink()
    return found


def _two_pairs(values: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = values
    return (first[0], first[1]), (second[0], second[1])
