"""Embed the images and prompts of pairs: threads decode and resize, the model follows one batch behind.

Units of rows are committed as they are done, so that a killed run continues. The name of the folder is a hash of all
that the embeddings depend on: those of other pairs or of another CLIP are in a folder beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress

from smpo_common.errors import UserError
from smpo_common.files import atomic_path, sha256_file, sha256_json, write_json
from smpo_common.store_path import AnyPath
from smpo_models.devices import reward_arithmetic
from smpo_pipeline.embeddings.options import EmbeddingOptions
from smpo_pipeline.embeddings.store import MARKER, Embeddings, read_rows, write_rows
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.decoder import Decoder
from smpo_pipeline.isolation import Outcome, run_isolated
from smpo_pipeline.jobs.reading import pair_fields, read_unit, unit_sizes
from smpo_pipeline.jobs.record.lock import locked
from smpo_pipeline.jobs.record.reject_rate import RejectRate
from smpo_pipeline.jobs.record.run_record import Run, UnitRecord, describe_input
from smpo_pipeline.rewards import Reward, checked_scores
from smpo_pipeline.rewards.networks.clip import ClipCosineReward
from smpo_schemas.pairs import Pair, PairRejectedError, ReadingChoices, layouts_of, list_pair_files, slice_files
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import REJECTS_FILE, Reject, read_rejects, write_rejects
from smpo_schemas.scoring.scores import IMAGE_IDS

_UNIT_ROWS = 512
_Row = tuple[str, Pair | PairRejectedError]


@dataclass(frozen=True)
class Extractor:
    """Embeds pairs by a CLIP, and scores them where a reward is given.

    Attributes:
        clip: the model.
        reward: also scores each image; None: no scores.
        stage: the command, for rejects.
        device: of both models.
        folder: for embeddings; each set has a folder of its own in it.
        options: of the user.
    """

    clip: ClipCosineReward
    reward: Reward | None
    stage: str
    device: str
    folder: Path
    options: EmbeddingOptions

    def __call__(self, pairs: Sequence[AnyPath], reading: ReadingChoices, flag: str = "--pairs") -> Embeddings:
        """Embed all pairs, or read what an earlier run has embedded.

        Raises:
            UserError: an input cannot be read, too many pairs are rejected, or no pair is left.
        """
        torch.backends.cudnn.allow_tf32 = False  # as in `score`
        files = list_pair_files(pairs, reading, flag)
        units, layouts = slice_files(files, _UNIT_ROWS), layouts_of(files)
        identity = {
            "job": "embed",
            **describe_input(files, reading, None),
            "clip": self.clip.fingerprint,
            "reward": self.reward.fingerprint if self.reward else None,
            "dtype": self.options.dtype,
        }
        out = self.folder / sha256_json(identity)[:16]
        run = Run(out, MARKER, identity)
        with locked(out):
            if run.open(overwrite=False, patterns=()):
                records = self._embed_units(run, units, layouts, flag)
                entries = [records[unit].entry for unit in range(len(units))]
                write_rejects(
                    out / REJECTS_FILE, [reject for unit in range(len(units)) for reject in records[unit].rejects]
                )
                write_json(out / MARKER, {"parts": [entry["name"] for entry in entries if entry]})
                run.finish()
        rejects = read_rejects(out / REJECTS_FILE)
        parts = sorted(out.glob("embeddings-*.parquet"))
        if not parts:
            raise UserError(f"{flag}: no pair could be embedded; the first: {rejects[0].source}: {rejects[0].reason}")
        return read_rows(parts, rejects)

    def _embed_units(self, run: Run, units: Sequence[Any], layouts: Any, flag: str) -> dict[int, UnitRecord]:  # noqa: ANN401
        """Embed the units that are not committed yet; return the records of all."""
        records, sizes = run.records(), unit_sizes(units)
        rate = RejectRate(self.options.max_reject_rate, run.out)
        with Progress(transient=True) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            task = progress.add_task(f"embedding {flag}", total=sum(sizes))
            for unit, ranges in enumerate(units):
                if unit not in records:
                    work = _Unit(self, pool)
                    work.embed(read_unit(ranges, layouts), lambda count: progress.update(task, advance=count))
                    records[unit] = self._commit(run, unit, sizes[unit], work)
                else:
                    progress.update(task, advance=sizes[unit])
                rate.add(records[unit])
        return records

    def _commit(self, run: Run, unit: int, rows: int, work: _Unit) -> UnitRecord:
        entry = None
        if work.rows:
            path = run.out / f"embeddings-{unit:06d}.parquet"
            with atomic_path(path) as temporary:
                write_rows(temporary, work.rows, len(work.rows[0]["text"]), scored=self.reward is not None)
                entry = {"name": path.name, "bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
        record = UnitRecord(unit=unit, pairs_in=rows, pairs=len(work.rows), rejects=work.rejects, entry=entry)
        run.commit(record)
        return record


@dataclass(frozen=True)
class _Prepared:
    """A decoded image: ``pixels`` as the CLIP takes them, ``image`` for the reward, if there is one."""

    pixels: torch.Tensor
    image: Image.Image | None


@dataclass(frozen=True)
class _Batch:
    """Rows that are being prepared.

    Attributes:
        entries: their fields (:func:`smpo_pipeline.jobs.reading.pair_fields`), with a ``reason`` where they are
            rejected already.
        images: by hash.
    """

    entries: list[dict[str, Any]]
    images: dict[str, Future[_Prepared]]


@dataclass
class _Unit:
    """Rows of one unit, as they are embedded; ``rejects`` are the others."""

    extractor: Extractor
    pool: ThreadPoolExecutor
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)

    def embed(self, rows: Iterator[_Row], done: Callable[[int], None]) -> None:
        """Embed the rows batch by batch; ``done`` is called with the number of rows of each."""
        for batch in self._one_ahead(rows):
            self._embed_batch(batch)
            done(len(batch.entries))

    def _one_ahead(self, rows: Iterator[_Row]) -> Iterator[_Batch]:
        """Yield each batch when the decoding of the next one has begun."""
        waiting = None
        while some := list(islice(rows, max(1, self.extractor.options.batch_size // 2))):
            batch = self._start(some)
            if waiting:
                yield waiting
            waiting = batch
        if waiting:
            yield waiting

    def _start(self, rows: Sequence[_Row]) -> _Batch:
        batch = _Batch([], {})
        for source, pair in rows:
            if isinstance(pair, PairRejectedError):
                batch.entries.append({"pair_id": pair.pair_id, "source": source, "reason": str(pair)})
                continue
            entry = pair_fields(pair, source)
            for name, data in zip(IMAGE_IDS, (pair.image_0, pair.image_1), strict=True):
                if entry[name] not in batch.images:
                    batch.images[entry[name]] = self.pool.submit(_prepare, data, self.extractor)
            batch.entries.append(entry)
        return batch

    def _embed_batch(self, batch: _Batch) -> None:
        ready, reasons = _wait(batch.images)
        # Each image and prompt once, though several pairs may share them.
        keys = {
            (entry[name], entry["prompt"]) for entry in batch.entries if "reason" not in entry for name in IMAGE_IDS
        }
        items = [(ready[name], name, prompt) for name, prompt in sorted(keys) if name in ready]
        outcome = run_isolated(self._run, items, self.extractor.device) if items else Outcome([], {})
        results: dict[tuple[str, str], _Result] = {}
        for positions, found in outcome.results:
            results |= {items[position][1:]: result for position, result in zip(positions, found, strict=True)}
        lost = {items[position][1:]: reason for position, reason in outcome.failed.items()}
        for entry in batch.entries:
            pair_keys = [] if "reason" in entry else [(entry[name], entry["prompt"]) for name in IMAGE_IDS]
            wrong = [reasons.get(key[0]) or lost.get(key) or results[key].reason for key in pair_keys]
            reason = next(filter(None, [entry.get("reason"), *wrong]), None)
            if reason:
                reject = {name: entry[name] for name in ("pair_id", "source")}
                self.rejects.append(Reject(**reject, stage=self.extractor.stage, reason=reason))
                continue
            sides = [results[key] for key in pair_keys]
            vectors = {f"image_{number}": side.image_D for number, side in enumerate(sides)} | {"text": sides[0].text_D}
            self.rows.append(entry | vectors | {f"score_{number}": side.score for number, side in enumerate(sides)})

    def _run(self, items: Sequence[tuple[_Prepared, str, str]]) -> list[_Result]:
        extractor, prompts = self.extractor, [prompt for _, _, prompt in items]
        pixels = torch.cat([prepared.pixels for prepared, _, _ in items])
        scores_N = np.zeros(len(items))
        with reward_arithmetic(extractor.device, extractor.options.dtype):
            image_ND, text_ND = (each.float().cpu().numpy() for each in extractor.clip.embed(pixels, prompts))
            if extractor.reward:
                images = [prepared.image for prepared, _, _ in items if prepared.image]
                scores_N = checked_scores(extractor.reward, images, prompts).values
        return list(map(_Result, image_ND, text_ND, scores_N))


@dataclass(frozen=True)
class _Result:
    """Embeddings of an image and its prompt, and its score, 0 where there is no reward."""

    image_D: np.ndarray
    text_D: np.ndarray
    score: float

    @property
    def reason(self) -> str | None:
        """Why it cannot be used, or None."""
        finite = np.isfinite(self.image_D).all() and np.isfinite(self.text_D).all() and np.isfinite(self.score)
        return None if finite else f"{RejectKind.NOT_FINITE}: an image of this pair has no embedding or no score"


def _wait(images: dict[str, Future[_Prepared]]) -> tuple[dict[str, _Prepared], dict[str, str]]:
    """Return the images, and why others cannot be used, by hash."""
    ready, reasons = {}, {}
    for name, future in images.items():
        try:
            ready[name] = future.result()
        except ImageRejectedError as reason:
            reasons[name] = str(reason)
    return ready, reasons


@cache
def _decoders() -> SimpleQueue[Decoder]:
    """Return a queue with one decoder per core; each has a child process, which a bad file may kill."""
    decoders: SimpleQueue[Decoder] = SimpleQueue()
    for _ in range(os.cpu_count() or 1):
        decoders.put(Decoder())
    return decoders


def _prepare(data: bytes, extractor: Extractor) -> _Prepared:
    """Decode and resize an image file.

    Raises:
        ImageRejectedError: it cannot be used.
    """
    decoder = _decoders().get()
    try:
        image = Image.fromarray(decoder.decode(data))
    finally:
        _decoders().put(decoder)
    return _Prepared(extractor.clip.pixels([image]), image if extractor.reward else None)
