"""Measure and size the stage of ``invert`` that encodes each distinct prompt once (``--text stored``)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smpo_pipeline.jobs.invert.models import load_text_encoders
from smpo_pipeline.jobs.invert.prompts import PROMPTS_PER_FILE, distinct_prompts, encode_batches
from smpo_pipeline.planning.options import PlanOptions
from smpo_schemas.frozen import FrozenModel
from smpo_schemas.pairs import PairFile, layouts_of, slice_files
from smpo_schemas.shards.text import text_bytes
from smpo_schemas.shards.text_rows import TextRow


class TextPlan(FrozenModel):
    """The cost of encoding and storing each distinct prompt once.

    Attributes:
        prompts: distinct ones of the data set, and the empty one.
        bytes: size of all files.
        seconds_per_prompt: measured on one device, without warm-up.
    """

    prompts: int
    bytes: int
    seconds_per_prompt: float


@dataclass(frozen=True)
class EncodedPrompts:
    """The sampled pairs' prompts, encoded, and what they cost.

    Attributes:
        rows: embeddings of each prompt, on the CPU, by the family's names.
        prompts: number of distinct prompts of the whole data set, the empty one included.
        seconds: mean time to encode a prompt.
    """

    rows: Mapping[str, TextRow]
    prompts: int
    seconds: float

    def __call__(self, prompts: Sequence[str]) -> list[TextRow]:
        """Stand for the stored text of :class:`smpo_models.family.Family`."""
        return [self.rows[prompt] for prompt in prompts]

    def plan(self, prompts: int) -> TextPlan:
        """Plan for a number of prompts like these."""
        size = text_bytes(prompts, list(self.rows.values()), PROMPTS_PER_FILE)
        return TextPlan(prompts=prompts, bytes=size, seconds_per_prompt=self.seconds)


def encode_sampled(options: PlanOptions, files: Sequence[PairFile], prompts: Sequence[str]) -> EncodedPrompts:
    """Encode prompts on the device, as `invert` does, and free the text encoders; count the data set's prompts.

    Args:
        options: of the command, with a resolved device.
        files: of the data set.
        prompts: of the sampled pairs.

    Raises:
        UserError: a file or the model cannot be read.
    """
    total = max(1, sum(file.rows for file in files))
    units = slice_files(files, total, options.running.limit)
    ranges = [rows for unit in units for rows in unit]
    count = len(distinct_prompts(ranges, layouts_of(files)))
    family = load_text_encoders(options)
    family.to(options.running.chosen_device)
    distinct = list(dict.fromkeys(["", *prompts]))
    rows: dict[str, TextRow] = {}
    begin, done = time.perf_counter(), 0
    for batch in encode_batches(family, distinct, options.settings.dtype):
        rows |= zip(distinct[len(rows) :], batch, strict=False)
        if len(rows) == len(batch) < len(distinct):
            begin, done = time.perf_counter(), len(batch)  # the first batch is the warm-up
    return EncodedPrompts(rows, count, (time.perf_counter() - begin) / (len(distinct) - done))
