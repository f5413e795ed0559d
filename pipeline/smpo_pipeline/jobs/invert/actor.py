"""The model actors of ``invert``: turn a unit of prepared pairs into one committed shard."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from smpo_common.errors import UserError
from smpo_pipeline.images.buckets import Size, list_buckets
from smpo_pipeline.inversion.batch import PreparedPair
from smpo_pipeline.inversion.generated import GeneratedPair, blank_pixels
from smpo_pipeline.inversion.health import HealthSums
from smpo_pipeline.inversion.inverter import Inverter
from smpo_pipeline.inversion.requests import batches_of_one_size, trajectory_requests, with_most_pixels
from smpo_pipeline.isolation import Failure, run_alone
from smpo_pipeline.jobs.batches import Batches
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.invert.models import ModelIdentity, load_models
from smpo_pipeline.jobs.invert.options import InvertOptions
from smpo_pipeline.jobs.invert.prepare import STAGE, unit_pairs
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.shards import index_part
from smpo_schemas.manifest import TEXT_FOLDER, StoredTextEntry
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject
from smpo_schemas.scoring.scores import IMAGE_IDS
from smpo_schemas.shards.index import write_index_part
from smpo_schemas.shards.samples import Sample
from smpo_schemas.shards.text import StoredText
from smpo_schemas.shards.writer import ShardWriter

_MEASURED_PAIRS = 128
"""About how many pairs of the input trajectory health is measured on, with one more forward per state."""


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
        text: StoredTextEntry | None = None,
    ) -> None:
        """Load the models.

        Args:
            options: of the command, with a resolved device.
            model: identity of the models that the driver loaded.
            run: where units are committed.
            scores: the scores table, or None, in Ray's object store.
            rows: input rows of the job.
            resolution: side of the square in pixels.
            work_log: of the job.
            text: the stored embeddings of all prompts; None: the model's text encoders are loaded.
        """
        self._device = options.running.chosen_device
        set_reproducible_arithmetic(self._device)
        family, inverting_denoiser = load_models(options, text=text is None)
        # Not raised here: Ray retries a constructor that raises five times.
        self._model_differs = not model.is_of(family, inverting_denoiser, options)
        self._cuts = family.cuts
        if text is not None:
            family.stored_text = stored = StoredText(run.out / TEXT_FOLDER, text)
            self._cuts = stored.cuts
        seed, self._trajectories_per_pair = options.trajectory.seed, options.trajectory.trajectories
        self._inverter = Inverter(family, inverting_denoiser, options.settings, seed, self._device)
        self._family, self._options, self._run = family, options, run
        self._scores: pa.Table | None = ray.get(scores)
        self._measure_every = max(1, rows // _MEASURED_PAIRS)
        self._resolution = resolution
        self._guard, self._reporter = CrashGuard(work_log), Reporter(work_log)
        self._batches = Batches(options.running.batch_size, self._device, run.out, "trajectory")

    def __call__(self, row: pa.Table) -> pa.Table:
        """Invert and commit the unit of a :func:`unit_row`; return its record as JSON.

        Raises:
            UserError: the model's files are not those that the driver found.
        """
        if self._model_differs:
            raise UserError(
                f"--model {self._options.models.model}: its files on {socket.gethostname()} (or those of --unet, "
                "--inverting-unet, --vae) differ from those where the command was started; give every machine the same "
                "files"
            )
        unit = row["unit"][0].as_py()
        record = self._run.committed(unit) or self._make(unit, row)
        self._batches.start_unit()
        return pa.table({"record": [record.model_dump_json()]})

    def _make(self, unit: int, row: pa.Table) -> UnitRecord:
        rejects = [Reject(**reject) for reject in json.loads(row["rejects"][0].as_py())]
        pairs = list(self._pairs(row, rejects))
        crashing = self._guard.crashing_items(unit, self._invert_alone, (pair for _, _, pair in pairs))
        with self._guard.working(unit, f"inverting unit {unit}; too little memory? Reduce --batch-size"):
            return self._commit(unit, pairs, rejects, crashing)

    def _commit(
        self, unit: int, pairs: Sequence[tuple[int, str, PreparedPair]], rejects: list[Reject], crashing: dict[int, str]
    ) -> UnitRecord:
        health = HealthSums()
        num_pairs = prompts_cut = 0
        sizes: Counter[Size] = Counter()
        with ShardWriter(self._run.out / f"shard-{unit:06d}.tar") as shard:
            trajectories = self._trajectories(unit, [pair for _, _, pair in pairs], crashing, health)
            for (number, source, pair), samples in zip(pairs, trajectories, strict=True):
                if isinstance(samples, Failure):
                    rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=samples.reason))
                    continue
                num_pairs += 1
                sizes[pair.image_size] += 1
                prompts_cut += self._cuts(pair.prompt)
                for sample in samples:
                    shard.write(f"{number * self._trajectories_per_pair + sample.meta.trajectory:010d}", sample)
            # Within the block: at its end the file takes its final name.
            self._run.require_current()
        record = UnitRecord(
            unit=unit,
            pairs_in=num_pairs + len(rejects),
            pairs=num_pairs,
            rejects=rejects,
            entry=shard.entry.model_dump() if num_pairs else None,
            health=health.to_lists(),
            prompts_cut=prompts_cut,
            buckets=list_buckets(sizes) if self._options.models.buckets else [],
            seconds=self._batches.seconds,
        )
        if num_pairs:
            write_index_part(index_part(self._run, unit), shard.trajectories)
        else:
            (self._run.out / shard.entry.name).unlink()
        self._run.commit(record)
        return record

    def _pairs(self, unit: pa.Table, rejects: list[Reject]) -> Iterator[tuple[int, str, PreparedPair]]:
        """Yield the input row number, source and pair of each pair; add those without scores to ``rejects``."""
        found = self._find_scores(cell_values(unit, "pair_id"))
        for row, content in unit_pairs(unit):
            scores = found.get(row["pair_id"], {})
            reason = None if self._scores is None else self._mismatch(scores, row)
            if reason:
                rejects.append(Reject(pair_id=row["pair_id"], source=row["source"], stage=STAGE, reason=reason))
                continue
            names = [name[:-2] for name in scores if name.endswith("_0")]
            pair = PreparedPair(
                pair_id=row["pair_id"],
                prompt=row["prompt"],
                label=row["label"],
                votes=row["votes"],
                annotator=row["annotator"],
                scores={name: (scores[f"{name}_0"], scores[f"{name}_1"]) for name in names},
                pixels_2HW3=blank_pixels(self._resolution) if row["noise"] else content,
                size=_two_pairs(row["size"]),
                crop=_two_pairs(row["crop"]),
                measured=row["row"] % self._measure_every == 0,
                generated=_generated(row, content) if row["noise"] else None,
            )
            yield row["row"], row["source"], pair

    def _mismatch(self, scores: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
        """Return why the scores under a pair's id, if any, are not its own; None if they are."""
        if not scores:
            return f"{RejectKind.NO_SCORE}: this pair is not in {self._options.scores} (rejected there, or not scored)"
        if scores["prompt"] != row["prompt"]:
            return f"{RejectKind.OTHER_PAIR}: {self._options.scores} has another prompt for this pair_id"
        if any(scores.get(name) not in (None, row[name]) for name in IMAGE_IDS):
            return f"{RejectKind.OTHER_IMAGES}: {self._options.scores} has other images, or their order exchanged"
        return None

    def _find_scores(self, ids: pa.Array) -> dict[str, dict[str, Any]]:
        """Return the first row of the scores table for each of a unit's ids that it has."""
        if self._scores is None:
            return {}
        scored = self._scores["pair_id"]
        # A hash set of the unit's ids: one of the table's, a million for each unit, takes fifteen times as long.
        rows = pc.indices_nonzero(pc.is_in(scored, value_set=ids.cast(scored.type)))
        # Reversed, so that the first row of an id is the one that the dict keeps.
        return {row["pair_id"]: row for row in reversed(self._scores.take(rows).to_pylist())}

    def _trajectories(
        self, unit: int, pairs: Sequence[PreparedPair], crashing: dict[int, str], health: HealthSums
    ) -> Iterator[list[Sample] | Failure]:
        """Yield the trajectories of each pair, made in batches, or the reason why there are none."""
        safe = [pair for position, pair in enumerate(pairs) if position not in crashing]
        requests = [(pair, trajectory) for pair in safe for trajectory in range(self._trajectories_per_pair)]
        if requests and not self._batches.chosen:
            trials = trajectory_requests(with_most_pixels(safe, self._resolution))
            self._batches.choose_size(
                lambda count: self._inverter.invert([next(trials) for _ in range(count)]),
                self._options.storing.pairs_per_shard * self._trajectories_per_pair,
            )
        made: dict[int, Sample | Failure] = {}
        for positions in batches_of_one_size(requests, lambda: self._batches.size):
            batch = self._make_batch([requests[position] for position in positions], health)
            made |= zip(positions, batch, strict=True)
            self._reporter.report(unit, None, len(made) / self._trajectories_per_pair)
        in_order = iter([made[position] for position in range(len(requests))])
        for position in range(len(pairs)):
            if position in crashing:
                yield Failure(crashing[position])
                continue
            samples = list(islice(in_order, self._trajectories_per_pair))
            failures = [sample for sample in samples if isinstance(sample, Failure)]
            yield failures[0] if failures else [sample for sample in samples if isinstance(sample, Sample)]

    def _make_batch(self, requests: Sequence[tuple[PreparedPair, int]], health: HealthSums) -> list[Sample | Failure]:
        """Make trajectories, or failures in their places, in order.

        Raises:
            UserError: memory does not hold a single trajectory.
        """
        outcome = self._batches.run(self._inverter.invert, requests)
        made: dict[int, Sample | Failure] = {position: Failure(reason) for position, reason in outcome.failed.items()}
        for positions, (samples, sums) in outcome.results:
            made |= dict(zip(positions, samples, strict=True))
            health += sums
        return [made[position] for position in range(len(requests))]

    def _invert_alone(self, pair: PreparedPair) -> None:
        for trajectory in range(self._trajectories_per_pair):
            run_alone(self._inverter.invert, (pair, trajectory), self._device)


def _generated(row: Mapping[str, Any], latents_K2Chw: np.ndarray) -> GeneratedPair:
    noise = [(each["seed"], each["index"], each["dtype"]) for each in row["noise"]]
    return GeneratedPair(latents_K2Chw, noise, tuple(row["timesteps"]))


def _two_pairs(values: list[list[int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    first, second = values
    return (first[0], first[1]), (second[0], second[1])
