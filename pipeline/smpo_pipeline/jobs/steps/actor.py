"""The model actors of ``steps``: turn a unit of prompts into one committed shard of pairs."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import pyarrow as pa

from smpo_common.errors import UserError
from smpo_pipeline.generation.generator import Wanted
from smpo_pipeline.isolation import Failure, run_alone
from smpo_pipeline.jobs.batches import Batches
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.generate.parts import Prompts, unit_rows
from smpo_pipeline.jobs.invert.models import ModelIdentity, load_models
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.shards import index_part
from smpo_pipeline.jobs.steps.options import StepsOptions
from smpo_pipeline.rewards import load_reward
from smpo_pipeline.step_pairs.pairs import step_pair_id
from smpo_pipeline.step_pairs.sampler import StepSampler
from smpo_schemas.manifest import TEXT_FOLDER, StepSettings, StoredTextEntry
from smpo_schemas.rejects import Reject
from smpo_schemas.shards.index import write_index_part
from smpo_schemas.shards.samples import Sample
from smpo_schemas.shards.text import StoredText
from smpo_schemas.shards.writer import ShardWriter

STAGE = "steps"

_TRIAL_STEPS = 2
"""Steps of a trajectory that batch sizes are tried with; the first is usually trained, and needs most memory."""


@dataclass(frozen=True)
class StepWork:
    """What the workers of a job share.

    Attributes:
        options: of the command, with a resolved device and a reward that any working directory finds.
        model: identity of the models that the driver loaded.
        reward: fingerprint of the reward that the driver loaded.
        steps: of the sampler.
        side: of the images in pixels.
        prompts: of the job.
        run: where units are committed.
        work_log: of the job.
        text: the stored embeddings of all prompts; None: the model's text encoders are loaded.
    """

    options: StepsOptions
    model: ModelIdentity
    reward: str
    steps: StepSettings
    side: int
    prompts: Prompts
    run: Run
    work_log: WorkLog
    text: StoredTextEntry | None


class StepsActor:
    """Holds the model and the reward; turns a unit into a shard and commits it."""

    def __init__(self, work: StepWork) -> None:
        """Load the models."""
        options = work.options
        device = options.running.chosen_device
        set_reproducible_arithmetic(device)
        family, sampling_denoiser = load_models(options, text=work.text is None)
        # Not raised here: Ray retries a constructor that raises five times.
        self._model_differs = not work.model.is_of(family, sampling_denoiser, options)
        self._cuts = family.cuts
        if work.text is not None:
            family.stored_text = stored = StoredText(work.run.out / TEXT_FOLDER, work.text)
            self._cuts = stored.cuts
        reward = load_reward(options.reward, device)
        self._reward_differs = reward.fingerprint != work.reward
        self._sampler = StepSampler(
            family,
            sampling_denoiser,
            options.settings,
            work.steps,
            reward,
            seed=options.trajectory.seed,
            side=work.side,
            device=device,
        )
        self._work, self._rows, self._run, self._device = work, work.prompts.rows(), work.run, device
        self._numbers = range(options.trajectory.trajectories)
        self._guard, self._reporter = CrashGuard(work.work_log), Reporter(work.work_log)
        self._batches = Batches(options.running.batch_size, device, work.run.out, "trajectory")

    def __call__(self, row: pa.Table) -> pa.Table:
        """Make and commit the unit of a one-row table; return its record as JSON.

        Raises:
            UserError: the files of the model or the reward are not those that the driver found.
        """
        if self._model_differs or self._reward_differs:
            options, machine = self._work.options, socket.gethostname()
            named = f"--model {options.models.model}" if self._model_differs else f"--reward {options.reward}"
            raise UserError(
                f"{named}: its files on {machine} (or those of --unet, --sampling-unet, --vae) differ from those where "
                "the command was started; give every machine the same files"
            )
        unit = row["unit"][0].as_py()
        record = self._run.committed(unit) or self._make(unit)
        self._batches.start_unit()
        return pa.table({"record": [record.model_dump_json()]})

    def _make(self, unit: int) -> UnitRecord:
        rows = unit_rows(self._rows, unit, self._work.prompts.per_unit)
        wanted = [(row["prompt"], number) for row in rows if not row["reason"] for number in self._numbers]
        crashing = self._guard.crashing_items(unit, self._sample_alone, wanted)
        with self._guard.working(unit, f"sampling unit {unit}; too little memory? Reduce --batch-size"):
            made = dict(zip(wanted, self._sample_all(unit, wanted, crashing), strict=True))
            return self._commit(unit, rows, made)

    def _sample_all(
        self, unit: int, wanted: Sequence[Wanted], crashing: dict[int, str]
    ) -> list[list[Sample | Failure]]:
        """Sample all trajectories in batches: the pairs of each, or why there are none."""
        trained = len(self._work.steps.trained)
        made: dict[int, list[Sample | Failure]] = {place: [Failure(why)] * trained for place, why in crashing.items()}
        safe = [place for place in range(len(wanted)) if place not in crashing]
        if safe and not self._batches.chosen:
            trials = cycle([wanted[place] for place in safe])
            self._batches.choose_size(
                lambda count: self._sampler.sample(list(islice(trials, count)), most_steps=_TRIAL_STEPS),
                self._work.prompts.per_unit * len(self._numbers),
            )
        done = 0
        while done < len(safe):
            places = safe[done : done + self._batches.size]
            outcome = self._batches.run(self._sampler.sample, [wanted[place] for place in places])
            for position, reason in outcome.failed.items():
                made[places[position]] = [Failure(reason)] * trained
            for positions, pairs in outcome.results:
                made |= dict(zip((places[position] for position in positions), pairs, strict=True))
            done += len(places)
            self._reporter.report(unit, None, done * trained)
        return [made[place] for place in range(len(wanted))]

    def _sample_alone(self, wanted: Wanted) -> None:
        run_alone(self._sampler.sample, wanted, self._device)

    def _commit(
        self, unit: int, rows: Sequence[dict[str, Any]], made: dict[Wanted, list[Sample | Failure]]
    ) -> UnitRecord:
        work, rejects, written, cut = self._work, [], 0, 0
        first = unit * work.prompts.per_unit
        with ShardWriter(self._run.out / f"shard-{unit:06d}.tar") as shard:
            for place, row in enumerate(rows):
                for number in self._numbers:
                    pairs = made.get((row["prompt"], number)) or [Failure(row["reason"])] * len(work.steps.trained)
                    for position, (step, pair) in enumerate(zip(work.steps.trained, pairs, strict=True)):
                        if isinstance(pair, Failure):
                            pair_id = None if row["reason"] else step_pair_id(row["prompt"], number, step)
                            source = f"{work.prompts.path}:{row['row']}"
                            rejects.append(Reject(pair_id=pair_id, source=source, stage=STAGE, reason=pair.reason))
                            continue
                        key = ((first + place) * len(self._numbers) + number) * len(work.steps.trained) + position
                        shard.write(f"{key:010d}", pair)
                        written += 1
                        cut += self._cuts(row["prompt"])
            # Within the block: at its end the file takes its final name.
            self._run.require_current()
        record = UnitRecord(
            unit=unit,
            pairs_in=written + len(rejects),
            pairs=written,
            rejects=rejects,
            entry=shard.entry.model_dump() if written else None,
            prompts_cut=cut,
            seconds=self._batches.seconds,
        )
        if written:
            write_index_part(index_part(self._run, unit), shard.trajectories)
        else:
            (self._run.out / shard.entry.name).unlink()
        self._run.commit(record)
        return record
