"""Read the candidates' rows once, and write the selected pairs in the order of their prompts."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from smpo_common.store_path import AnyPath
from smpo_models.draws import named_stream
from smpo_pipeline.images.decode import ImageRejectedError
from smpo_pipeline.images.image_store import ImageStore
from smpo_pipeline.selection.candidates import CandidateTable
from smpo_pipeline.selection.further_columns import FurtherColumns, ImageColumns
from smpo_pipeline.selection.methods import NoPairError, Proposal, Selection
from smpo_pipeline.selection.pairs_file import PairsFile
from smpo_schemas.pairs import Layout, Pair, PairFile, PairRejectedError, RowRange, image_id, read_rows
from smpo_schemas.reject_kinds import RejectKind
from smpo_schemas.rejects import Reject

STAGE = "select"

_WAITING = 4
"""Prompts per thread whose images may wait for a judge, so that a slow prompt does not stop the others."""

_MOST_PROMPT = 200
"""Most characters of a prompt in a reason."""


@dataclass(frozen=True)
class Labelling:
    """How pairs are written.

    Attributes:
        annotator: name of the selection, for the column.
        label: whether the chosen image is labelled as preferred.
        seed: decides which image becomes image_0.
    """

    annotator: str
    label: bool
    seed: int


class SelectedPair(NamedTuple):
    """A pair that was written: id, prompt, places of both images in the table's flattened [P, 2], label, gap."""

    pair_id: str
    prompt: str
    places: tuple[int, int]
    image_ids: tuple[str, str]
    label: float | None
    gap: float


class Assembly:
    """Keeps the images that are needed until their prompt is complete, then writes its pairs.

    Attributes:
        rows: number of rows read.
        pairs: the pairs written so far.
        rejects: rows that cannot be used; after :meth:`finish` also prompts without a pair.
    """

    def __init__(
        self,
        table: CandidateTable,
        method: Selection,
        further: FurtherColumns,
        labelling: Labelling,
        store: ImageStore,
        file: PairsFile,
    ) -> None:
        self._table, self._method, self._further, self._labelling = table, method, further, labelling
        self._store, self._file = store, file
        self.rows = 0
        self.pairs: list[SelectedPair] = []
        self.rejects: list[Reject] = []
        self._reasons: dict[int, str] = {}
        """Why a prompt has no pair."""
        self._sources: dict[int, str] = {}
        """First row of each prompt."""
        self._columns: dict[int, ImageColumns] = {}
        self._decided = [[] if method.needs_images else self._decide(prompt) for prompt in range(len(table.prompts))]
        self._wanted = [self._images_wanted(prompt) for prompt in range(len(table.prompts))]
        self._next = 0
        self._pool = ThreadPoolExecutor(method.concurrency, thread_name_prefix="select")
        self._deciding: deque[tuple[int, Future[list[Proposal]]]] = deque()
        """Complete prompts that are not written yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(
        self, files: Sequence[PairFile], layouts: Mapping[AnyPath, Layout], advance: Callable[[int], None]
    ) -> None:
        """Read all rows of these files; ``advance`` is called with the number of rows so far."""
        names = list(self._further.types)
        for file in files:
            further = names if file.path.suffix == ".parquet" else ()
            for source, pair in read_rows(RowRange(file.path, 0, file.rows), layouts[file.path], further):
                self._add(source, pair)
                self.rows += 1
                advance(self.rows)

    def finish(self) -> None:
        """Write the pairs whose images are there, and reject the prompts without a pair."""
        while self._next < len(self._wanted):
            missing = len(self._wanted[self._next])
            if missing:
                self._reasons[self._next] = self._reason(
                    self._next, RejectKind.IMAGES_MISSING, f"{missing} that were scored are in no row of --candidates"
                )
            else:
                self._complete(self._next)
            self._next += 1
        self._write_decided(0)
        for prompt, reason in sorted(self._reasons.items()):
            source = self._sources.get(prompt, "")
            self.rejects.append(Reject(pair_id=None, source=source, stage=STAGE, reason=reason))

    def _decide(self, prompt: int, load: Callable[[int], bytes] | None = None) -> list[Proposal]:
        """Select the pairs of a prompt, or keep the reason why there are none."""
        try:
            return self._method.select(self._table.candidates(prompt, load))
        except NoPairError as error:
            self._reasons[prompt] = self._reason(prompt, error.kind, error.details)
        except (RuntimeError, ImageRejectedError) as error:
            self._reasons[prompt] = self._reason(prompt, RejectKind.JUDGE_FAILED, str(error))
        return []

    def _reason(self, prompt: int, kind: RejectKind, details: str) -> str:
        start, stop = self._table.bounds(prompt)
        shown = self._table.prompts[prompt][:_MOST_PROMPT]
        images = f"{stop - start} image{'s' if stop - start > 1 else ''}"
        return f"{kind}: {details + '; ' if details else ''}{images} of {shown!r}"

    def _images_wanted(self, prompt: int) -> dict[str, int]:
        """Return the numbers of the images to keep, by hash."""
        start, stop = self._table.bounds(prompt)
        numbers = list(range(start, stop))
        if not self._method.needs_images:
            numbers = sorted({start + side for pair in self._decided[prompt] for side in (pair.chosen, pair.rejected)})
        return {self._table.image_ids[number]: number for number in numbers}

    def _add(self, source: str, pair: Pair | PairRejectedError) -> None:
        if isinstance(pair, PairRejectedError):
            self.rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=str(pair)))
            return
        prompt = self._table.pairs.get(pair.pair_id)
        if prompt is None or self._table.prompts[prompt] != pair.prompt:
            kind = RejectKind.NO_SCORE if prompt is None else RejectKind.OTHER_PAIR
            words = "this pair is not in --scores" if prompt is None else "--scores has another prompt for this pair_id"
            self.rejects.append(Reject(pair_id=pair.pair_id, source=source, stage=STAGE, reason=f"{kind}: {words}"))
            return
        self._sources.setdefault(prompt, source)
        wanted = self._wanted[prompt]
        if not wanted:  # hashing would read every image again
            return
        for side, data in enumerate((pair.image_0, pair.image_1)):
            number = wanted.pop(image_id(data), None)
            if number is not None:
                self._store.put(number, data)
                self._columns[number] = self._further.of_image(pair.further, side)
        while self._next < len(self._wanted) and not self._wanted[self._next]:
            self._complete(self._next)
            self._next += 1

    def _complete(self, prompt: int) -> None:
        """Write the pairs of a prompt whose images are here, or have a thread select them."""
        if not self._method.needs_images:
            self._write(prompt, self._decided[prompt])
            return
        self._deciding.append((prompt, self._pool.submit(self._decide, prompt, self._store.get)))
        self._write_decided(_WAITING * self._method.concurrency)

    def _write_decided(self, most: int) -> None:
        """Write what is decided, in order, and wait until at most ``most`` prompts are undecided."""
        while self._deciding and (len(self._deciding) > most or self._deciding[0][1].done()):
            prompt, future = self._deciding.popleft()
            self._write(prompt, future.result())

    def _write(self, prompt: int, proposals: Sequence[Proposal]) -> None:
        """Write the pairs of a prompt, and forget its images."""
        start, stop = self._table.bounds(prompt)
        for proposal in proposals:
            self._write_pair(prompt, start + proposal.chosen, start + proposal.rejected, proposal.gap)
        for number in range(start, stop):
            self._store.drop(number)
            self._columns.pop(number, None)

    def _write_pair(self, prompt: int, chosen: int, rejected: int, gap: float) -> None:
        text, ids = self._table.prompts[prompt], self._table.image_ids
        pair_id = selected_pair_id(text, ids[chosen], ids[rejected])
        # The position of an image must not tell which one won.
        swapped = bool(named_stream(f"{self._labelling.seed}/image_0/{pair_id}").integers(2))
        images = (rejected, chosen) if swapped else (chosen, rejected)
        label = None if not self._labelling.label else float(not swapped)
        values: dict[str, Any] = {
            "pair_id": pair_id,
            "prompt": text,
            "image_0": self._store.get(images[0]),
            "image_1": self._store.get(images[1]),
            "label": label,
            "annotator": self._labelling.annotator,
            "chosen_image": int(swapped),
            "gap": gap,
        }
        self._file.add(values | self._further.of_pair([self._columns[number] for number in images]))
        first, second = images
        places = (int(self._table.place_I[first]), int(self._table.place_I[second]))
        self.pairs.append(SelectedPair(pair_id, text, places, (ids[first], ids[second]), label, gap))


def selected_pair_id(prompt: str, *image_ids: str) -> str:
    """Hash the prompt and both images' hashes, in either order."""
    text = "\n".join((*sorted(image_ids), prompt))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
