"""The candidates of each prompt, from a scores table.

Shape suffixes: P rows of the table, I distinct images, K rewards, N images of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from smpo_common.errors import UserError
from smpo_common.store_path import AnyPath
from smpo_models.draws import named_stream
from smpo_pipeline.selection.methods import Candidates
from smpo_schemas.preference.winrate import WinRate, distinct_images, win_rates
from smpo_schemas.scoring.scores import IMAGE_IDS, image_ids, reward_scores


class CandidateTable:
    """All scored candidates, grouped by prompt; an image in several rows counts once.

    Attributes:
        prompts: distinct prompts, in the order of their first row.
        pairs: number of the prompt, by the pair_id of each row.
        image_ids: [I] content hashes; prompt by prompt, increasing within each.
        place_I: each image's first place in the flattened [P, 2] of the table.
    """

    def __init__(self, folder: AnyPath, table: pa.Table, mix: WinRate, seed: int) -> None:
        """Group the rows and compute the win rates.

        Args:
            folder: the table's, for errors.
            table: rows of the scores table.
            mix: rewards, with weights and scales.
            seed: of the run.

        Raises:
            UserError: the table does not identify its images.
        """
        ids_P2 = image_ids(table)
        if ids_P2 is None:
            raise UserError(
                f"--scores {folder}: the table lacks image hashes ({', '.join(IMAGE_IDS)}), which tell candidates "
                "apart; run `smpo-pipeline score` again"
            )
        rows = table["prompt"].to_pylist()
        self.prompts = list(dict.fromkeys(rows))
        numbers = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.pairs = dict(zip(table["pair_id"].to_pylist(), map(numbers.__getitem__, rows), strict=True))
        images = distinct_images(rows, ids_P2)
        self.place_I = images.place_I
        self.image_ids: list[str] = ids_P2.reshape(-1)[images.place_I].tolist()
        self._bounds = list(images.bounds())
        self._weights, self._seed = mix.weights, seed
        scores = [images.first_scores(reward_scores(table, name)) for name in mix.weights]
        self._scores_IK = np.stack(scores, axis=1)
        scaled = zip(scores, mix.scales.values(), strict=True)
        self._rates_IK = np.stack([win_rates(each / scale, images.prompt_I) for each, scale in scaled], axis=1)

    def bounds(self, prompt: int) -> tuple[int, int]:
        """Return the range of a prompt's images."""
        return self._bounds[prompt]

    def candidates(self, prompt: int, load: Callable[[int], bytes] | None = None) -> Candidates:
        """Return the images of a prompt.

        Args:
            prompt: its number.
            load: returns the file of image i of I; None if the method needs no images.
        """
        start, stop = self._bounds[prompt]
        return Candidates(
            prompt=self.prompts[prompt],
            image_ids=self.image_ids[start:stop],
            rewards=list(self._weights),
            weights=list(self._weights.values()),
            scores_NK=self._scores_IK[start:stop],
            rates_NK=self._rates_IK[start:stop],
            stream=named_stream(f"{self._seed}/select/{self.prompts[prompt]}"),
            load=None if load is None else lambda index: load(start + index),
        )
