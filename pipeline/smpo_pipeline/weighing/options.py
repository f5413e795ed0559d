"""The flags of ``smpo-pipeline weigh``. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from smpo_common.errors import UserError
from smpo_common.options import Flag, Options, Overwrite
from smpo_pipeline.embeddings.options import EmbeddingOptions, Features
from smpo_pipeline.options import FILE, FOLDER, ColumnOptions, ExistingPath, LocalPath, Pairs


class WeighOptions(Options):
    """The flags of ``weigh``."""

    scores: Annotated[LocalPath, FOLDER]
    """Output directory of `smpo-pipeline score`; the column is added to its table."""
    pairs: Pairs
    golden: Annotated[ExistingPath | None, FILE] = None
    """The golden pairs, those of the distribution that the model is meant for: a file with their pair_ids, one per
    line, or a Parquet file with a column pair_id. Or give --golden-column."""
    golden_column: Annotated[str | None, Flag(metavar="NAME")] = None
    """Column of the scores table, or of --pairs by their pair_id, that is true, or 1, for golden pairs."""
    source_column: Annotated[str | None, Flag(metavar="NAME")] = None
    """Column of the scores table, or of --pairs, that names the source of each other pair. Default: the others are one
    source."""
    features: Features = "clipscore"
    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds, split by prompt: no image is weighed by a classifier that has seen its prompt."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split into folds."""
    column: Annotated[str, Field(min_length=1), Flag(metavar="NAME")] = "weight"
    """Column to write, for `smpo-train --weight-column`."""
    normalise: Annotated[bool, Flag(off="--no-normalise")] = True
    """Divide the weights by their mean, so that the learning rate keeps its meaning."""
    columns: ColumnOptions = ColumnOptions()
    embedding: EmbeddingOptions = EmbeddingOptions()
    overwrite: Overwrite = False
    """Replace a column that weigh did not write."""

    @model_validator(mode="after")
    def _one_golden_set(self) -> Self:
        if (self.golden is None) == (self.golden_column is None):
            raise UserError("give either --golden FILE or --golden-column NAME, which say which pairs are golden")
        return self
