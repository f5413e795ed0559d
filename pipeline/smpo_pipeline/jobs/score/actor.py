"""The model actors of ``score``: each holds one reward and adds its scores to chunks."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
from PIL import Image

from smpo_common.errors import UserError
from smpo_models.devices import reward_arithmetic
from smpo_pipeline.isolation import run_alone, run_isolated
from smpo_pipeline.jobs.cells import cell_values
from smpo_pipeline.jobs.cluster.session import set_reproducible_arithmetic
from smpo_pipeline.jobs.faults.crashes import CrashGuard
from smpo_pipeline.jobs.record.progress import Reporter
from smpo_pipeline.jobs.record.work_log import WorkLog
from smpo_pipeline.jobs.score.chunks import chunk_images, with_scores, without_images
from smpo_pipeline.rewards import Reward, Scored, checked_scores, load_reward


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
            fingerprint: of the weights that the driver found under that name.
            device: cpu or cuda.
            dtype: of matrix products, by autocast: weights and sensitive operations stay in float32.
            batch_size: images per model call, at most.
            work_log: of the job.
            share: of a pair's work that this reward is, 0 to 1; for the progress bar.
            last: whether no other reward needs the images.
        """
        set_reproducible_arithmetic(device)
        self._reward: Reward = load_reward(spec, device)
        self._spec, self._fingerprint = spec, fingerprint
        self._autocast = partial(reward_arithmetic, device, dtype)
        self._device, self._batch_size, self._last = device, batch_size, last
        self._guard, self._reporter, self._share = CrashGuard(work_log), Reporter(work_log), share

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """Score all images of a chunk, ``batch_size`` at a time.

        Raises:
            UserError: the reward's weights are not those that the driver found.
        """
        # Not in the constructor: Ray retries a constructor that raises five times.
        if self._reward.fingerprint != self._fingerprint:
            raise UserError(
                f"--reward {self._spec}: the weights on {socket.gethostname()} (fingerprint "
                f"{self._reward.fingerprint[:12]}) differ from those where the command was started "
                f"({self._fingerprint[:12]}); give every machine the same files"
            )
        name, unit, number = self._reward.name, chunk["unit"][0].as_py(), chunk["chunk"][0].as_py()
        key = (name, unit, number)
        with self._autocast():
            run_one = partial(run_alone, self._score, device=self._device)
            failed = self._guard.crashing_items(key, run_one, chunk_images(chunk))
        work = f"scoring chunk {number} of unit {unit} with --reward {name}; too little memory? Reduce --batch-size"
        with self._autocast(), self._guard.working(key, work):
            scores = self._scores(chunk, failed)
        scored = with_scores(chunk, {name: scores}, failed)
        return without_images(scored) if self._last else scored

    def _scores(self, chunk: pa.Table, failed: dict[int, str]) -> np.ndarray:
        """Score a chunk's images that are not in ``failed``, and add those that the reward fails on to it.

        Returns:
            float64 [N], NaN for failed images.
        """
        scores = np.full(len(cell_values(chunk, "height")), np.nan)
        # A batch never spans chunks, so that the result does not depend on which worker has which chunk.
        images = ((number, image) for number, image in enumerate(chunk_images(chunk)) if number not in failed)
        while batch := list(islice(images, self._batch_size)):
            numbers = np.array([number for number, _ in batch])
            outcome = run_isolated(self._score, [image for _, image in batch], self._device)
            self._batch_size = outcome.largest_batch or self._batch_size
            for positions, scored in outcome.results:
                scores[numbers[positions]] = scored.values
                failed |= {int(numbers[positions[position]]): reason for position, reason in scored.reasons.items()}
            failed |= {int(numbers[position]): reason for position, reason in outcome.failed.items()}
            self._report(chunk, (numbers[-1] + 1) / len(scores))
        return scores

    def _report(self, chunk: pa.Table, done: float) -> None:
        """Report progress; ``done`` is the share of the chunk's images, 0 to 1."""
        unit, number = chunk["unit"][0].as_py(), chunk["chunk"][0].as_py()
        pairs = len(cell_values(chunk, "pair_id")) * self._share * done
        self._reporter.report(unit, (number, self._reward.name), pairs)

    def _score(self, batch: Sequence[tuple[Image.Image, str]]) -> Scored:
        return checked_scores(self._reward, [image for image, _ in batch], [prompt for _, prompt in batch])
